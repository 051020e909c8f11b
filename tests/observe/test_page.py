"""The page about runs: it holds what was logged, needs nothing from outside, and runs nothing that files say."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain.bench.recall import RecallOutcome, write
from pretrain.cli import app
from pretrain.errors import InputError
from pretrain.evaluate.recall.command import RecallSuite
from pretrain.evaluate.recall.text import TextRecall
from pretrain.evaluate.recall.training import Accuracy
from pretrain.observe.page import write_page
from tests.observe.test_report import make_run

HOSTILE = '<script>alert("x")</script><img src="http://example.org/x.png" onerror="alert(1)">'


class Elements(HTMLParser):
    """Every element with its attributes, and which are open where they should be closed."""

    VOID = {"meta", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page: Path) -> Elements:
    elements = Elements()
    elements.feed(page.read_text())
    assert elements.open == []
    return elements


def test_a_page_holds_the_figures_of_all_runs(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", 40, tokens=4000, tflops_per_second=1.5, model_flops_utilization=0.25)
    second = make_run(tmp_path / "second", 30, peak_memory_bytes=3 * 2**30, **{"grad_norm/layers.0": 0.125})
    (first / "recall.json").write_text(json.dumps({"passkey": {"512": 0.75}, "mqar": [0.5]}))
    samples = [{"step": step, "prompt": "Once", "text": f"text {step}"} for step in range(1, 31)]
    (second / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)) + '\n{"step": 31, "pro')
    text = write_page([first, second], tmp_path / "pages" / "runs.html").read_text()
    for expected in (
        "Training of 2 runs", "<td>first</td>", "25.0%", "3.00 GiB", "<td>5,000</td>",
        "passkey / 512", "0.75", "mqar / 0", "text 1<", "text 30<", "<td>layers.0</td><td>0.125</td>",
    ):  # fmt: skip
        assert expected in text, expected
    assert f"<td>40</td><td>{1.1 + 4 / 40:.4f}</td><td>-</td>" in text, "an evaluation that one run did not have"
    assert text.count("<td class=words") == 12, "texts are thinned out, the first and the last kept"
    elements = parsed(tmp_path / "pages" / "runs.html")
    (picture,) = [attributes["src"] for tag, attributes in elements.found if tag == "img"]
    assert b"<svg" in base64.b64decode(picture.removeprefix("data:image/svg+xml;base64,"))


def test_recall_is_shown_wherever_it_was_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 5)
    results = [
        TextRecall("passkey", float(length), depth, 4, depth / 2, depth) for length in (256, 1024) for depth in (0, 1)
    ]
    suite = RecallSuite("checkpoint", 5, 128, [256, 1024], results, ["a < note"])
    (run / "recall.json").write_text(json.dumps(suite.to_dict()))
    accuracy = {32: Accuracy(0.75, 4, {}), 64: Accuracy(0.5, 4, {})}
    outcomes = [
        RecallOutcome(model, "mqar", ["mlstm"], 10, 5, 32, accuracy, dict.fromkeys(accuracy, 0.125))
        for model in ("small", "large")
    ]
    write(outcomes, tmp_path / "suite")
    page = tmp_path / "page.html"
    ended = CliRunner().invoke(app, ["report", str(run), "--html", str(page), "--recall", str(tmp_path / "suite")])
    assert ended.exit_code == 0, ended.output
    # Coloured by how far it is from a guess to all.
    assert f"rgba(0, 158, 115, {0.5 * (0.75 - 0.125) / 0.875:.2f})" in page.read_text()
    text = re.sub(r' style="[^"]*"', "", page.read_text())
    for expected in (
        "<th>passkey: depth</th><th>256 tokens</th><th>1,024 tokens</th>",
        "<td>1</td><td>0.50 / 1.00</td><td>0.50 / 1.00</td>",
        "a &lt; note",
        "<th>chance</th><th>small</th><th>large</th>",
        "<td>mqar</td><td>64</td><td>0.125</td><td>0.500</td><td>0.500</td>",
    ):
        assert expected in text, expected
    pictures = [attributes["src"][:15] for tag, attributes in parsed(page).found if tag == "img"]
    assert pictures == ["data:image/svg+", "data:image/png;"]


@pytest.mark.parametrize("content", [None, "{[", "[1]", '{"results": []}', '[{"model": "a", "task": "b"}]'])
def test_what_is_no_recall_suite_is_refused(content: str | None, tmp_path: Path) -> None:
    run, suite = make_run(tmp_path / "run", 5), tmp_path / "suite"
    suite.mkdir()
    if content is not None:
        (suite / "recall.json").write_text(content)
    with pytest.raises(InputError, match="expected the directory that 'pretrain bench recall --out DIRECTORY' wrote"):
        write_page([run], tmp_path / "page.html", [suite])
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(InputError, match="give --html too"):
        CliRunner().invoke(
            app, ["report", str(run), "--output", "a.png", "--recall", str(suite)], catch_exceptions=False
        )


def test_what_files_say_is_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a<b>&'\"c", 5, **{f"grad_norm/{HOSTILE}": 1.0})
    (run / "recall.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": HOSTILE, "text": HOSTILE}))
    (run / "rollbacks.json").write_text(json.dumps([{HOSTILE: HOSTILE}]))
    (run / "config.yaml").write_text(json.dumps({HOSTILE: HOSTILE}))
    page = write_page([run], tmp_path / "page.html")
    elements = parsed(page)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in elements.found}
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on")]
        assert all(not re.match(r"\s*(https?:)?//", attributes.get(name) or "") for name in ("src", "href")), tag
    assert page.read_text().count("&lt;script&gt;") >= 8
    assert "default-src 'none'" in page.read_text()


@pytest.mark.parametrize("file", ["recall.json", "rollbacks.json", "config.yaml"])
def test_a_damaged_file_is_named_and_the_rest_is_shown(file: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 5)
    (run / file).write_text("{[")
    text = write_page([run], tmp_path / "page.html").read_text()
    assert f"run: {file} cannot be shown" in text and "Training of run" in text


def test_a_run_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no metrics.jsonl"):
        write_page([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
