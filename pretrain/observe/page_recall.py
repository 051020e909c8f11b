"""Recall on the page about runs: of a trained model over texts, and of models trained from scratch on each task.

Both come from files that other commands wrote: ``recall.json`` of ``pretrain evaluate RUN --suite recall``, which lies
in the run, and of ``pretrain bench recall --out DIRECTORY``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from pretrain.errors import InputError
from pretrain.observe.page_elements import is_finite, note, picture, read, table

RECALL_FILE = "recall.json"
_PNG = b"\x89PNG\r\n\x1a\n"


def recall_of_run(name: str, directory: Path) -> str:
    """What the model of a run recalls, a table for each task; empty where it was never evaluated."""
    try:
        text = read(directory / RECALL_FILE)
        content = None if text is None else json.loads(text)
        if content is None:
            return ""
        return f"<h3>{escape(name)}</h3>" + (_suite(content) or table(["what", "value"], list(_leaves(content, ()))))
    except (OSError, ValueError, RecursionError) as error:
        return note(name, RECALL_FILE, str(error))


def recall_from_scratch(path: Path) -> str:
    """The outcome of ``pretrain bench recall``: a row for each task and length, a column for each model.

    Args:
        path: its directory, or the ``recall.json`` in it; the picture beside that is shown too, where there is one.

    Raises:
        InputError: there is no such file, or it is not one of these.
    """
    file = path / RECALL_FILE if path.is_dir() else path
    expected = f"expected the directory that 'pretrain bench recall --out DIRECTORY' wrote, with {RECALL_FILE} in it"
    try:
        text = read(file)
        if text is None:
            raise InputError(f"--recall {path}: there is no {file}; {expected}")
        shown = _outcomes(json.loads(text))
        drawing = file.with_name("recall.png")
        drawn = drawing.read_bytes() if drawing.is_file() else b""
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--recall {path}: {file} cannot be read: {error}; {expected}") from None
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"--recall {path}: {file} is not an outcome of bench recall; {expected}") from None
    if drawn.startswith(_PNG):
        shown += picture(drawn, "png", "share of right answers over the length of the test, by task and model")
    return f"<h3>{escape(str(path))}: models trained from scratch</h3>" + shown


def _outcomes(outcomes: list[dict[str, Any]]) -> str:
    models = list(dict.fromkeys(str(outcome["model"]) for outcome in outcomes))
    found: dict[tuple[str, str], dict[str, float]] = {}
    chances: dict[tuple[str, str], float] = {}
    for outcome in outcomes:
        for length, chance in outcome["chance"].items():
            place = str(outcome["task"]), str(length)
            chances[place] = float(chance)
            found.setdefault(place, {})[str(outcome["model"])] = float(outcome["accuracy"][length]["share"])
    rows, shares = [], {}
    for number, ((task, length), by_model) in enumerate(found.items()):
        cells = [f"{by_model[model]:.3f}" if model in by_model else "-" for model in models]
        rows.append([task, length, f"{chances[task, length]:.3f}", *cells])
        for place, model in enumerate(models):
            # Of what is better than a guess.
            gained = (by_model.get(model, 0.0) - chances[task, length]) / max(1 - chances[task, length], 1e-9)
            shares[number, 3 + place] = _from_0_to_1(gained)
    said = "<p>Share of right answers; the first length of each task is that of the training.</p>"
    return said + table(["task", "length", "chance", *models], rows, shares=shares)


def _suite(content: Any) -> str | None:
    """Of each task a row for each depth and a column for each length; None where this is something else."""
    try:
        tasks: dict[str, dict[tuple[float, float], tuple[float, float]]] = {}
        for result in content["results"]:
            place = float(result["depth"]), float(result["length"])
            tasks.setdefault(str(result["task"]), {})[place] = float(result["exact"]), float(result["tokens"])
        notes = "".join(f'<p class="note">{escape(str(text))}</p>' for text in content["notes"])
        said = f"after {int(content['step']):,} steps, trained on rows of {int(content['training_length']):,} tokens"
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    parts = [f"<p>{escape(said)}. Share of answers that are right as a whole / of their tokens.</p>"]
    for task, results in tasks.items():
        depths, lengths = (sorted({place[index] for place in results}) for index in (0, 1))
        rows, shares = [], {}
        for number, depth in enumerate(depths):
            row = [f"{depth:g}"]
            for column, length in enumerate(lengths, start=1):
                exact, right = results.get((depth, length), (float("nan"),) * 2)
                row.append(f"{exact:.2f} / {right:.2f}" if (depth, length) in results else "-")
                shares[number, column] = _from_0_to_1(right)
            rows.append(row)
        parts.append(table([f"{task}: depth", *(f"{length:,.0f} tokens" for length in lengths)], rows, shares=shares))
    return "".join(parts) + notes


def _from_0_to_1(share: float) -> float:
    return min(max(share, 0.0), 1.0) if is_finite(share) else 0.0


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[list[str]]:
    """Whatever a file holds: what is inside of what stands in front of it."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, (*path, str(key)))
    else:
        yield [" / ".join(path), f"{value:.4g}" if isinstance(value, float) else str(value)]
