"""A search as tables in the terminal, and its best layout as a file that configurations build on. No torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from data.preparation.files import write_whole
from pretrain.config import load_config
from pretrain.errors import InputError
from pretrain.plan.estimate import plan
from pretrain.plan.gpus import USABLE_FRACTION
from pretrain.plan.numbers import format_bytes, format_count
from pretrain.plan.search import Candidate, Layout, Search, with_layout
from pretrain.plan.speed import LINK_EFFICIENCY

SHOWN = 10


def describe(layout: Layout) -> str:
    """How a layout cuts the model and its batch, what is 1 left out."""
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context, "expert": layout.expert}
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    if layout.sequence:
        parts.insert(1, "sequence")
    return ", ".join([*parts, f"data {layout.data}", f"zero {layout.zero}"])


def print_search(search: Search, console: Console) -> None:
    """Prints the fastest layouts with where their time goes, and why the others are left out."""
    console.print(_fitting(search))
    if search.fitting:
        console.print(
            f"Estimates: products at {search.utilization:.0%} of the peak rate (--mfu), links at {LINK_EFFICIENCY:.0%} "
            f"of theirs; sending, hidden behind products (only what ZeRO-3 sends), and bubble are shares of a step. Of "
            f"layouts that cut the model alike the fastest stands here."
        )
    if search.uncounted_teacher is not None:
        console.print(
            f"Not counted: the teacher {search.uncounted_teacher}, for its checkpoint is not there; its weights and "
            f"work come on top."
        )
    console.print(_refusals(search))


def _fitting(search: Search) -> Table:
    usable = format_bytes(search.usable_bytes)
    title = (
        f"{len(search.fitting):,} of {search.layouts:,} layouts of {search.world_size} x {search.gpu} fit "
        f"{usable} ({USABLE_FRACTION:.0%} of its memory)"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layout", min_width=14)
    for heading in (
        "micro-\nbatch",
        "recom-\npute",
        "memory",
        "s a\nstep",
        "tokens\na second",
        "MFU",
        "send-\ning",
        "hid-\nden",
        "bub-\nble",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for candidate in search.best(SHOWN):
        layout, step = candidate.layout, candidate.step
        table.add_row(
            describe(layout),
            str(layout.micro_batch_size),
            layout.recompute,
            format_bytes(candidate.bytes_per_rank),
            f"{step.total:.3g}",
            format_count(candidate.tokens_per_second),
            f"{candidate.model_flops_utilization:.1%}",
            f"{sum(step.communication.values()) / step.total:.0%}",
            f"{step.hidden_communication / step.total:.0%}",
            f"{step.bubble / step.total:.0%}",
        )
    return table


def _refusals(search: Search) -> Table:
    table = Table(title="What is left out", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layouts", justify="right")
    table.add_column("why, and those alike")
    for refusal in search.refusals:
        table.add_row(f"{refusal.layouts:,}", refusal.reason)
    return table


def write_layout(target: Path, candidate: Candidate, search: Search, config: Path, overrides: Sequence[str]) -> None:
    """Writes a layout as YAML that ``base`` may name behind CONFIG; it is loaded, and planned anew, before that.

    Args:
        target: file to write, not there yet.
        candidate: of ``search``.
        config, overrides: of which the layout was searched.

    Raises:
        InputError: the file is there, its folder is not, or an override stands above what it says.
    """
    if target.exists():
        raise InputError(f"{target} is there already; give --write a new name, or remove it")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder, in which --write was to put {target.name}; make it first")
    layout = candidate.layout
    header = (
        f"# {describe(layout)}, for {search.world_size} x {search.gpu}: {format_bytes(candidate.bytes_per_rank)} a "
        f"rank.\n# Take it by `base: [RUN.yaml, {target.name}]`; what stands later counts.\n"
    )
    text = header + yaml.safe_dump(layout.overrides(), sort_keys=False)
    with tempfile.TemporaryDirectory() as directory:
        alone, both = Path(directory) / "layout.yaml", Path(directory) / "both.yaml"
        alone.write_text(text)
        both.write_text(yaml.safe_dump({"base": [str(config.resolve()), str(alone)]}))
        found = plan(load_config(both, overrides), search.world_size, search.gpu, search.utilization)
    expected = with_layout(load_config(config, overrides), layout)
    if found != plan(expected, search.world_size, search.gpu, search.utilization):
        raise InputError(
            f"{target} is not written: an override among {', '.join(overrides)} stands above the layout that was "
            f"found; leave out those of parallel, train.micro_batch_size and train.recompute"
        )
    write_whole(target, text.encode())
