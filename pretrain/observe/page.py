"""One page of HTML about runs, with all that it shows inside: no file beside it, no script, no network.

Everything that comes from files is escaped; pictures are in ``img`` elements, in which browsers run nothing.
"""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import InputError
from pretrain.observe.metrics import read_metrics, replace_file
from pretrain.observe.page_elements import is_finite, note, picture, read, section, spread, table
from pretrain.observe.page_recall import recall_from_scratch, recall_of_run
from pretrain.observe.report import distinct_names, report_figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 76rem; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
img { max-width: 100%; height: auto; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e5e5e5; text-align: right; white-space: nowrap; }
th { background: #f6f6f6; } th:first-child, td:first-child { text-align: left; }
th.words, td.words { text-align: left; }
td { vertical-align: top; }
td.words { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 50rem; }
td.words, pre { font: 13px/1.5 ui-monospace, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; margin: .3rem 0; }
p.note { color: #666; }
"""


@dataclass(frozen=True)
class _Run:
    name: str
    directory: Path
    records: list[dict[str, Any]]

    def values(self, key: str) -> list[float]:
        """The finite values under ``key``, by step."""
        return [record[key] for record in self.records if is_finite(record.get(key))]


def write_page(run_directories: Sequence[str | Path], output: str | Path, suites: Sequence[str | Path] = ()) -> Path:
    """Writes a page that compares runs: figures, curves, held-out losses, recall, samples, configurations.

    Of each run ``metrics.jsonl`` must be there; ``config.yaml``, ``recall.json``, ``samples.jsonl`` and
    ``rollbacks.json`` are shown where they are, and passed over with a note where they cannot be read.

    Args:
        run_directories: directories of runs that have trained.
        output: the page, which is replaced whole.
        suites: what ``pretrain bench recall --out`` wrote, to be shown too.

    Raises:
        InputError: a run has no metrics, one of ``suites`` is not there, or the page cannot be written.
    """
    output, directories = Path(output), [Path(directory) for directory in run_directories]
    from_scratch = [recall_from_scratch(Path(suite)) for suite in suites]
    figure = report_figure(directories)
    names = distinct_names(directories)
    runs = [
        _Run(name, path, read_metrics(path / "metrics.jsonl")) for name, path in zip(names, directories, strict=True)
    ]
    title = f"Training of {names[0]}" if len(names) == 1 else f"Training of {len(names)} runs"
    parts = [
        f"<h1>{escape(title)}</h1>",
        table(["run", *(label for label, _ in _SUMMARY)], [[run.name, *_summary(run)] for run in runs]),
        "<h2>Curves</h2>",
        picture(_as_svg(figure), "svg+xml", "loss, learning rate, gradient norm, speed and MFU over the steps"),
        *section("Held-out loss", [_held_out(runs)]),
        *section("Blocks and recurrent layers", [_layers(run) for run in runs]),
        *section("Recall", [*(recall_of_run(run.name, run.directory) for run in runs), *from_scratch]),
        *section("Samples over time", [_samples(run) for run in runs]),
        *section("Loss spikes", [_rollbacks(run) for run in runs]),
        *section("Configurations", [_configuration(run) for run in runs]),
    ]
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\">\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{chr(10).join(parts)}\n</body>\n</html>\n"
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror or error}") from None
    return output


def _last(key: str, text: str) -> Callable[[_Run], str]:
    return lambda run: text.format(values[-1]) if (values := run.values(key)) else "-"


def _lowest(run: _Run) -> str:
    return f"{min(values):.4f}" if (values := run.values("held_out_loss")) else "-"


def _median(key: str, text: str, factor: float = 1.0) -> Callable[[_Run], str]:
    return lambda run: text.format(factor * statistics.median(values)) if (values := run.values(key)) else "-"


def _skipped(run: _Run) -> str:
    return f"{sum(record.get('skipped') is True for record in run.records):,}"


# Column of the first table -> what stands in it.
_SUMMARY: tuple[tuple[str, Callable[[_Run], str]], ...] = (
    ("steps", _last("step", "{:,}")),
    ("tokens", _last("tokens", "{:,}")),
    ("training loss", _last("loss", "{:.4f}")),
    ("held-out loss", _last("held_out_loss", "{:.4f}")),
    ("lowest", _lowest),
    ("bits per byte", _last("held_out_bits_per_byte", "{:.4f}")),
    ("tokens/s", _median("tokens_per_second", "{:,.0f}")),
    ("TFLOP/s", _median("tflops_per_second", "{:.4g}")),
    ("MFU", _median("model_flops_utilization", "{:.1f}%", 100.0)),
    ("peak memory", _last("peak_memory_bytes", "{:,}")),
    ("skipped steps", _skipped),
)


def _summary(run: _Run) -> list[str]:
    cells = [cell(run) for _, cell in _SUMMARY]
    memory = [label for label, _ in _SUMMARY].index("peak memory")
    if values := run.values("peak_memory_bytes"):
        cells[memory] = f"{values[-1] / 2**30:,.2f} GiB"
    return cells


def _as_svg(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    return content.getvalue()


def _held_out(runs: list[_Run]) -> str:
    by_run = [
        {record["step"]: record["held_out_loss"] for record in run.records if is_finite(record.get("held_out_loss"))}
        for run in runs
    ]
    steps = spread(sorted(set().union(*by_run)))
    rows = [[f"{step:,}", *(f"{losses[step]:.4f}" if step in losses else "-" for losses in by_run)] for step in steps]
    return table(["step", *(run.name for run in runs)], rows) if rows else ""


def _layers(run: _Run) -> str:
    """The last figures of blocks and layers, one row each."""
    record = next((record for record in reversed(run.records) if any("/" in key for key in record)), None)
    if record is None:
        return ""
    names = [key.split("/", 1) for key in record if "/" in key]
    figures = list(dict.fromkeys(figure for figure, _ in names))
    blocks = list(dict.fromkeys(block for _, block in names))
    rows = []
    for block in blocks:
        values = [record.get(f"{figure}/{block}") for figure in figures]
        rows.append([block, *(f"{value:.4g}" if is_finite(value) else "" for value in values)])
    return f"<h3>{escape(run.name)}, step {record['step']:,}</h3>" + table(["block", *figures], rows)


def _samples(run: _Run) -> str:
    """For each prompt what the model wrote after so many steps; lines of ``step``, ``prompt`` and ``text``."""
    try:
        lines = (read(run.directory / "samples.jsonl") or "").splitlines()
    except OSError as error:
        return note(run.name, "samples.jsonl", str(error))
    by_prompt: dict[str, list[list[str]]] = {}
    for line in lines:
        try:
            sample = json.loads(line)
            row = [f"{int(sample['step']):,}", str(sample["text"])]
            by_prompt.setdefault(str(sample["prompt"]), []).append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            # The last one may be half written.
            continue
    return "".join(
        f"<h3>{escape(run.name)}, {'after the prompt' if prompt else 'without a prompt'}</h3>"
        + (f"<pre>{escape(prompt)}</pre>" if prompt else "")
        + table(["step", "text"], spread(rows), frozenset({1}))
        for prompt, rows in by_prompt.items()
    )


def _rollbacks(run: _Run) -> str:
    try:
        text = read(run.directory / "rollbacks.json")
        rows = [[str(value) for value in entry.values()] for entry in json.loads(text)] if text else []
        heads = list(json.loads(text)[0]) if rows else []
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return note(run.name, "rollbacks.json", str(error))
    spikes = sum(record.get("spike") is True for record in run.records)
    said = (
        f"<p>{escape(run.name)}: {spikes:,} steps with a spike, {len(rows):,} rollbacks</p>" if spikes or rows else ""
    )
    return said + (table([head.replace("_", " ") for head in heads], rows) if rows else "")


def _configuration(run: _Run) -> str:
    try:
        text = read(run.directory / "config.yaml")
        if text is not None:
            yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        return note(run.name, "config.yaml", " ".join(str(error).split()))
    summary = f"<summary>{escape(run.name)}</summary>"
    return f"<details>{summary}<pre>{escape(text)}</pre></details>" if text else ""
