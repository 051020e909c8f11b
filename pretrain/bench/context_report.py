"""What ``bench context`` prints."""

from __future__ import annotations

import os
import statistics
from importlib.metadata import version
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pretrain.bench.context import ContextBenchmark, Settings, Timing, bench_context, device_for
from pretrain.bench.context_traffic import traffic_table
from pretrain.bench.train import machine
from pretrain.errors import InputError


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def parse_ranks(text: str) -> tuple[int, ...]:
    """Numbers of ranks from text such as ``1,2,4``.

    Raises:
        InputError: something in it is no number of ranks.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--ranks {text!r}: must be whole numbers above 0 with commas between them, such as 1,2,4")
    return tuple(int(part) for part in parts)


def time_table(timing: Timing, available: int) -> Table:
    """Medians over the rounds, of ratios to the ideal the least and the most too.

    Args:
        timing: to show.
        available: cores of the machine.
    """
    drawn = Table(title=f"{timing.title}, {timing.tokens:,} tokens", box=box.SIMPLE_HEAD)
    for heading in ("ranks", "scheme", "ms", "times ideal", "at best", "processor", "kB"):
        drawn.add_column(heading, justify="left" if heading == "scheme" else "right", no_wrap=True)
    before = 1
    for row in timing.rows:
        if row.ranks != before:
            drawn.add_section()
        before = row.ranks
        figures = [f"{row.ranks}{'*' if row.ranks > available else ''}", row.scheme]
        figures.append(f"{1e3 * statistics.median(row.seconds):,.1f}")
        if row.ranks > 1:
            ratios = timing.ratios(row)
            figures += [
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})",
                f"{timing.at_best(row):.2f}",
                f"{statistics.median(timing.processor_ratios(row)):.2f}",
                f"{row.bytes / 1e3:,.0f}",
            ]
        drawn.add_row(*figures)
    return drawn


def about(settings: Settings) -> dict[str, Any]:
    """The machine, the versions and the settings, for JSON."""
    packages = {name: version(name) for name in ("torch", "megatron-core")}
    return machine() | {
        "threads": settings.threads,
        "cores": cores(),
        "device": device_for(max(settings.groups)),
        "versions": packages,
        "ranks": settings.groups,
        "tokens": settings.tokens,
        "rounds": settings.rounds,
    }


def to_dict(result: ContextBenchmark, settings: Settings) -> dict[str, Any]:
    """Plain numbers for JSON, every round's."""
    return about(settings) | {
        "traffic": [row.to_dict() for row in result.traffic],
        "times": [timing.to_dict() for timing in result.timings],
    }


def print_bench_context(settings: Settings, as_json: bool = False) -> None:
    """Measures, and prints tables, or JSON with every round.

    Raises:
        InputError: an option cannot be.
        CheckError: what was sent is not what the formulas say, which is printed first, or an outcome is wrong.
    """
    console, progress = Console(), Console(stderr=True)
    result = bench_context(settings, (lambda text: None) if as_json else progress.print)
    if as_json:
        console.print_json(data=to_dict(result, settings))
        result.check()
        return
    here = about(settings)
    console.print(
        f"{here['processor']}, {here['cores']} cores, {here['threads']} threads a process, torch {here['torch']}, "
        f"{here['device']}"
    )
    if result.traffic:
        console.print(traffic_table(result.traffic))
    for timing in result.timings:
        console.print(time_table(timing, here["cores"]))
    if result.timings:
        lines = [
            f"Forward and backward of one sequence, medians (least..most) of {settings.rounds} rounds; ratios are "
            f"taken within a round. Every row has the outcome and the gradients of one process.",
            "times ideal: of one process's time over the number of ranks.",
            "at best: the same where messages take no time and every rank has a core; ranks of a chain take turns, but "
            "for what they do in other layers.",
            "processor: time of all ranks over one process's. kB: received by all ranks.",
            f"all-to-all: Megatron-core's, over heads; only where {settings.sizes.heads} heads divide over the ranks.",
        ]
        if here["device"] == "cpu" and max(settings.groups) > here["cores"]:
            lines.append(
                f"*: more ranks than the {here['cores']} cores, which bounds times ideal; see processor there."
            )
        console.print("\n".join(lines))
    result.check()
