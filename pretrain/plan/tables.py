"""Tables of a plan: FLOPs by length, what ranks send, and where a step's time goes."""

from __future__ import annotations

from rich.table import Table

from pretrain.plan.communication import PURPOSES
from pretrain.plan.estimate import Plan
from pretrain.plan.numbers import format_bytes, format_count
from pretrain.plan.speed import Speed


def lengths_table(plan: Plan) -> Table:
    """Useful FLOPs of a token, forward and backward, at several lengths."""
    figures = plan.flops_by_length
    table = Table(title="Useful FLOPs of a training token by length of its sequence", title_justify="left")
    table.add_column("part")
    for length in figures.lengths:
        table.add_column(f"{length:,}", justify="right")
    table.add_row("products with weights", *[format_count(figures.products)] * len(figures.lengths))
    for kind, row in figures.along_the_sequence.items():
        table.add_row(f"along the sequence: {kind}", *map(format_count, row))
    shares = [1 - figures.products / total for total in figures.totals]
    table.add_row("together", *map(format_count, figures.totals))
    table.add_row("share along the sequence", *(f"{share:.1%}" for share in shares))
    return table


def traffic_table(plan: Plan) -> Table:
    """What a rank sends in a step."""
    sent = format_bytes(sum(entry.sent for entry in plan.traffic))
    table = Table(title="What a rank sends in a step", title_justify="left", show_footer=True)
    table.add_column("purpose", footer="together")
    table.add_column("call")
    table.add_column("ranks", justify="right")
    table.add_column("bytes", justify="right", footer=sent)
    table.add_column("what it is")
    for entry in plan.traffic:
        call = entry.collective.replace("_", "-")
        table.add_row(entry.purpose, call, str(entry.ranks), format_bytes(entry.sent), PURPOSES[entry.purpose])
    return table


def speed_rows(speed: Speed) -> dict[str, str]:
    """Duration of the run at the stated utilisation."""
    at = f"at {speed.model_flops_utilization:.0%} of it (--mfu)"
    return {
        f"tokens per second {at}": format_count(speed.tokens_per_second),
        f"days {at}": f"{speed.days:.3g}",
        f"GPU hours {at}": f"{speed.gpu_hours:,.0f}",
    }


def step_table(speed: Speed) -> Table:
    """Where a step's time goes where nothing is hidden that the code does not hide."""
    step = speed.step
    title = f"A step, products at {speed.model_flops_utilization:.0%} of the peak rate, communication not hidden"
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("part", footer="together")
    table.add_column("seconds", justify="right", footer=f"{step.total:.3g}")
    table.add_column("share", justify="right", footer=f"{format_count(speed.tokens_per_second_unhidden)} tokens/s")
    rows = {"executed FLOPs": step.compute, "weights and optimizer": step.weights}
    rows |= {f"communication: {purpose}": seconds for purpose, seconds in step.communication.items()}
    rows["pipeline bubble"] = step.bubble
    for name, seconds in rows.items():
        if seconds:
            table.add_row(name, f"{seconds:.3g}", f"{seconds / step.total:.1%}")
    if step.hidden_communication:
        table.add_row("[dim]hidden communication[/dim]", f"[dim]({step.hidden_communication:.3g})[/dim]", "")
    return table
