"""Pieces of the page about runs: tables, notes, and files that may be missing. What comes from files is escaped."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

# Rows of a table of evaluations, and texts of a prompt: the first, the last, and what fits between.
MOST_ROWS = 12


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: frozenset[int] = frozenset(),
    shares: Mapping[tuple[int, int], float] | None = None,
) -> str:
    """A table.

    Args:
        words: columns of running text.
        shares: (row, column) -> a number from 0 to 1, by which the cell is coloured.
    """
    kinds = [" class=words" if place in words else "" for place in range(len(heads))]
    head = "".join(f"<th{kind}>{escape(cell)}</th>" for kind, cell in zip(kinds, heads, strict=True))
    body = ""
    for number, row in enumerate(rows):
        cells = ""
        for place, (kind, cell) in enumerate(zip(kinds, row, strict=False)):
            share = (shares or {}).get((number, place))
            colour = "" if share is None else f' style="background: rgba(0, 158, 115, {0.5 * share:.2f})"'
            cells += f"<td{kind}{colour}>{escape(cell)}</td>"
        body += f"<tr>{cells}</tr>\n"
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def section(title: str, parts: Sequence[str]) -> list[str]:
    """A heading and what is under it; nothing where there is nothing."""
    found = [part for part in parts if part]
    return [f"<h2>{escape(title)}</h2>", *found] if found else []


def picture(content: bytes, kind: str, description: str) -> str:
    """A picture inside the page, in which browsers run nothing; ``kind`` as in ``svg+xml`` or ``png``."""
    encoded = base64.b64encode(content).decode()
    return f'<img alt="{escape(description)}" src="data:image/{kind};base64,{encoded}">'


def note(name: str, file: str, problem: str) -> str:
    """Says that a file of a run cannot be shown."""
    return f'<p class="note">{escape(f"{name}: {file} cannot be shown: {problem}")}</p>'


def read(path: Path) -> str | None:
    """The text of a file; None where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def spread(items: list[Any]) -> list[Any]:
    """At most so many of them, the first and the last among them."""
    if len(items) <= MOST_ROWS:
        return items
    return [items[round(place * (len(items) - 1) / (MOST_ROWS - 1))] for place in range(MOST_ROWS)]


def is_finite(value: object) -> bool:
    """Whether it is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
