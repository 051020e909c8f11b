"""A profile as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pretrain.observe.profile import Profile

_LONGEST_NAME = 60


def print_profile(profile: Profile, operations: int, console: Console) -> None:
    """Prints the phases of a step and the ``operations`` that take longest."""
    step = sum(profile.phases.values())
    console.print(
        f"{profile.steps} steps on {profile.device}, {1000 * step:,.1f} ms a step, "
        f"{profile.tokens_per_step / max(step, 1e-9):,.0f} tokens/s, rank 0"
    )
    phases = Table("phase", "ms a step", "share")
    for name, seconds in profile.phases.items():
        phases.add_row(name, f"{1000 * seconds:,.2f}", f"{100 * seconds / max(step, 1e-9):.1f}%")
    console.print(_right(phases))
    on_device = any(operation.device_seconds for operation in profile.operations)
    table = Table("operation", "calls a step", "CPU ms a step", *(["GPU ms a step"] if on_device else []), "share")
    for operation in profile.operations[:operations]:
        name = operation.name if len(operation.name) <= _LONGEST_NAME else operation.name[: _LONGEST_NAME - 3] + "..."
        times = [operation.cpu_seconds, *([operation.device_seconds] if on_device else [])]
        shown = [f"{1000 * seconds / profile.steps:,.3f}" for seconds in times]
        table.add_row(name, f"{operation.calls / profile.steps:,.1f}", *shown, f"{100 * operation.share:.1f}%")
    console.print(_right(table))
    console.print("times of operations are their own, under the profiler, which slows steps down; traces:")
    for path in profile.traces:
        console.print(path, soft_wrap=True)


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table
