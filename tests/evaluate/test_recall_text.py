"""The recall suite over texts: what is asked can be read off the prompt, answers are scored, other models refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from data.tokenizers.byte_level import ByteTokenizer
from pretrain.cli import app
from pretrain.errors import InputError
from pretrain.evaluate.recall import text as text_recall
from pretrain.evaluate.recall.command import evaluate_recall
from pretrain.evaluate.recall.text import CopyingText, PasskeyText, recall_of_text
from tests.convert.checkpoints import model_section, write_run
from tests.models.hat_models import hat_model

TOKENIZER = ByteTokenizer()
NUMBER = re.compile(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.")


class _Reader(nn.Module):
    """Knows the passkey once it has read it, and answers ``x`` to all else; its state is what it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def logits(self, tokens: Tensor, states: dict | None) -> tuple[Tensor, dict]:
        before = tokens[:, :0] if states is None else states["read"]["tokens"]
        read = torch.cat([before, tokens], dim=1)
        logits = torch.zeros(*tokens.shape, 257)
        for row, ids in enumerate(read.tolist()):
            text = "".join(chr(token) for token in ids[1:])
            for place in range(tokens.shape[1]):
                so_far = text[: before.shape[1] + place]
                known, asked = (
                    NUMBER.search(so_far),
                    re.search(r"What is the pass key\? The pass key is (\d*)$", so_far),
                )
                answer = known[1][len(asked[1]) :] if known and asked else ""
                logits[row, place, ord(answer[0] if answer else "x")] = 1.0
        return logits, {"read": {"tokens": read}}


@pytest.mark.parametrize("segment", [64, 4096])
def test_who_remembers_the_passkey_is_right_at_every_depth(segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_recall, "SEGMENT", segment)
    results = recall_of_text(_Reader(), TOKENIZER, [200, 300], examples=2)
    assert [result.depth for result in results[:5]] == [0, 0.25, 0.5, 0.75, 1]
    passkey = [result for result in results if result.task == "passkey"]
    assert len(passkey) == 10 and all(result.exact == result.tokens == 1 for result in passkey)
    assert {result.length for result in passkey} == {1 + 200 + 5, 1 + 300 + 5}
    copying = [result for result in results if result.task == "copying"]
    # One letter of 26 is right by chance.
    assert len(copying) == 10 and all(result.exact == 0 and result.tokens < 0.3 for result in copying)


def test_prompts_hold_what_is_asked_where_they_say() -> None:
    for depth in (0.0, 0.5, 1.0):
        example = PasskeyText().example(400, depth, 3)
        assert len(example.prompt) == 400 and example == PasskeyText().example(400, depth, 3)
        found = NUMBER.search(example.prompt)
        assert found[1] == example.answer
        room = 400 - len(found[0]) - 2 - len("\nWhat is the pass key? The pass key is ")
        assert found.start() - 1 == round(depth * room)
        copied = CopyingText().example(400, depth, 3)
        asked = copied.prompt[-4:]
        (line,) = [line for line in copied.prompt[:-5].splitlines() if line.startswith(asked) and len(line) == 12]
        assert line == asked + copied.answer
    assert len({PasskeyText().example(400, 0.5, index).answer for index in range(20)}) > 15
    with pytest.raises(InputError, match="passkey: 50 bytes do not hold it; give 99 or more"):
        PasskeyText().example(50, 0.5, 0)


def test_command_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run")
    arguments = ["evaluate", str(run), "--suite", "recall", "--samples", "2", "--lengths", "160,200"]
    picture = tmp_path / "recall.png"
    ended = CliRunner().invoke(app, [*arguments, "--plot", str(picture), "--json"], catch_exceptions=False)
    figures = json.loads(ended.stdout)
    assert figures["lengths"] == [160, 200] and len(figures["results"]) == 2 * 2 * 5
    assert all(0 <= result["exact"] <= result["tokens"] < 0.5 for result in figures["results"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "recall.json").read_text()) == figures, "kept where the report looks for it"
    text = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "160 bytes" in text and text.count("depth") == 2 and text.count("0.25") >= 2


def test_only_a_run_keeps_the_outcome_and_one_that_cannot_is_told(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run")
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert not evaluate_recall(checkpoint, 1, [160]).notes
    assert not list(tmp_path.rglob("recall.json*"))
    (run / "recall.json.tmp").mkdir()
    (note,) = evaluate_recall(run, 1, [160]).notes
    assert "recall.json cannot be written" in note


def test_what_is_refused(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run")
    for arguments, message in (
        (["--suite", "ruler"], "expected recall, the only suite"),
        (["--suite", "recall", "--by-position"], "leave it out, or --suite"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(app, ["evaluate", str(run), *arguments], catch_exceptions=False)
    with pytest.raises(InputError, match="copying: 10 bytes|passkey: 10 bytes"):
        evaluate_recall(run, 1, [10])
    words, _ = write_run(
        tmp_path / "words", model=model_section(**hat_model()), data={"tokenizer": {"type": "hierarchical_bytes"}}
    )
    with pytest.raises(InputError, match="model.hierarchy.type=hat reads words"):
        evaluate_recall(words, 1)

    class Joining(ByteTokenizer):
        def encode(self, text: bytes):
            # As a tokenizer that has one id for a space and the digit behind it.
            return super().encode(re.sub(rb" (\d)", rb"\1", text))

    with pytest.raises(InputError, match="the tokenizer joins the end of the prompt .* with the answer"):
        recall_of_text(_Reader(), Joining(), [200], examples=1)
