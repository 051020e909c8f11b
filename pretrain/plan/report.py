"""A plan as tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pretrain.plan.context import ContextPlan
from pretrain.plan.estimate import Plan
from pretrain.plan.gpus import USABLE_FRACTION
from pretrain.plan.numbers import format_bytes, format_count
from pretrain.plan.peak import MOMENTS, PARTS
from pretrain.plan.tables import lengths_table, speed_rows, step_table, traffic_table


def print_plan(plan: Plan, console: Console) -> None:
    """Prints what the run needs, what the heaviest rank holds, and whether it fits the GPU that was named."""
    console.print(_overview(plan))
    console.print(_memory(plan))
    console.print(lengths_table(plan))
    if plan.traffic:
        console.print(traffic_table(plan))
    if len(plan.stages) > 1:
        console.print(_stages(plan))
    if plan.context is not None:
        console.print(_context(plan.context))
    if plan.uncounted_teacher is not None:
        console.print(
            f"Not counted: the teacher {plan.uncounted_teacher}, for its checkpoint is not there. Its forward pass, "
            f"and 4 bytes of each of its weights whatever ZeRO's stage, come on top."
        )
    if plan.gpu is not None and plan.speed is not None:
        gpu = plan.gpu
        console.print(step_table(plan.speed))
        verdict = "[green]fits[/green]" if gpu.fits else "[red]does not fit[/red]"
        console.print(
            f"{format_bytes(plan.bytes_per_rank)} a rank {verdict} {gpu.name}: {format_bytes(gpu.usable_bytes)} "
            f"usable ({USABLE_FRACTION:.0%} of {format_bytes(gpu.memory_bytes)})."
        )


def _overview(plan: Plan) -> Table:
    table = Table(title="Run", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    layout = ", ".join(f"{name} {value}" for name, value in plan.layout.items())
    rows = {
        "parameters": f"{plan.parameters:,}",
        "active parameters": f"{plan.active_parameters:,}",
        "useful FLOPs per training token": format_count(plan.flops_per_token),
        "executed FLOPs per training token": format_count(plan.hardware_flops_per_token),
        "tokens per step": f"{plan.tokens_per_step:,}",
        "tokens of the run": format_count(plan.training_tokens),
        "useful FLOPs of the run": format_count(plan.training_flops),
        "processes": f"{plan.world_size:,}",
        "layout": layout,
        "micro-batches per step and rank": f"{plan.micro_batches:,}",
        "pipeline bubble": f"{plan.pipeline_bubble_fraction:.1%}",
    }
    if plan.tokens_per_inner_position > 1:
        rows["tokens per innermost position, expected"] = f"{plan.tokens_per_inner_position:.4g}"
    if plan.gpu is not None:
        peak = plan.gpu.peak_flops_per_second * plan.world_size
        rows["peak rate of all GPUs"] = f"{format_count(peak)}FLOP/s bf16"
        rows["tokens per second at peak rate"] = format_count(plan.gpu.tokens_per_second_at_peak)
        rows["days at peak rate"] = f"{plan.training_flops / peak / 86400:.3g}"
    if plan.speed is not None:
        rows |= speed_rows(plan.speed)
    rows["host memory of asynchronous saves, a rank"] = format_bytes(plan.save_host_bytes)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _memory(plan: Plan) -> Table:
    where = f", on pipeline stage {plan.heaviest_stage}" if len(plan.stages) > 1 else ""
    title = f"Memory of the heaviest rank{where}, at its heaviest moment: {plan.heaviest_moment}"
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("part", footer="together")
    table.add_column("bytes", justify="right", footer=format_bytes(plan.bytes_per_rank))
    table.add_column("what it is")
    for name, count in plan.bytes_per_rank_by_part.items():
        if count:
            table.add_row(name.replace("_", " "), format_bytes(count), PARTS[name])
    heaviest = plan.stages[plan.heaviest_stage]
    for kind, count in heaviest.bytes_by_moment.items():
        table.add_row(f"[dim]{MOMENTS[kind]}[/dim]", f"[dim]({format_bytes(count)})[/dim]",
                      "[dim]all that is there at the heaviest of these moments[/dim]")  # fmt: skip
    for setting, count in heaviest.activation_bytes.items():
        together = format_bytes(heaviest.bytes_by_recompute[setting])
        table.add_row(f"[dim]train.recompute={setting}[/dim]", f"[dim]({format_bytes(count)})[/dim]",
                      f"[dim]activations under this setting, {together} together with the rest[/dim]")  # fmt: skip
    return table


def _context(plan: ContextPlan) -> Table:
    title = f"What a rank is sent about the segments of others, {plan.segment_length:,} tokens each"
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("mixer", footer="a step")
    table.add_column("layers", justify="right")
    table.add_column("scheme")
    table.add_column("messages a layer", justify="right")
    table.add_column("bytes a layer and micro-batch", justify="right", footer=format_bytes(plan.bytes_per_step))
    for layer in plan.layers:
        table.add_row(layer.mixer, str(layer.layers), layer.scheme, f"{layer.messages:.4g}", format_bytes(layer.bytes))
    return table


def _stages(plan: Plan) -> Table:
    table = Table(title="Pipeline stages", title_justify="left")
    for heading in ("stage", "layers", "parameters", "activations", "together"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        table.add_row(
            str(stage.stage),
            str(stage.layers),
            f"{stage.parameters:,}",
            format_bytes(stage.bytes_by_part["activations"]),
            format_bytes(stage.bytes),
        )
    return table
