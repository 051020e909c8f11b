"""A picture of one or several runs: loss, learning rate, gradient norm, speed and MFU over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import InputError
from pretrain.observe.metrics import read_metrics
from pretrain.observe.picture import COLOURS, check_suffix, save, style

_SMOOTHED_SHARE = 50


@dataclass(frozen=True)
class _Run:
    """The metrics of a run as columns; NaN where a step has none."""

    name: str
    columns: dict[str, np.ndarray]

    def points(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) where the values are finite; both of shape (n,)."""
        values = self.columns[key]
        known = np.isfinite(values)
        return self.columns["step"][known], values[known]

    @property
    def bits_per_byte_over_loss(self) -> float | None:
        """How many bits per byte a nat per token is: constant for one tokenizer on one held-out text."""
        ratios = self.columns["held_out_bits_per_byte"] / self.columns["held_out_loss"]
        ratios = ratios[np.isfinite(ratios) & (ratios > 0)]
        return float(np.median(ratios)) if ratios.size else None


def draw_report(run_directories: Sequence[str | Path], output: str | Path) -> Path:
    """Draw the metrics of runs into one picture.

    Four panels over the step: training loss (faint as logged, strong as a moving average) with the held-out
    losses as points, learning rate, gradient norm (log scale), tokens per second; where a run knows its model FLOPs
    utilization, that and useful TFLOP/s too. Bits per byte stand on the right of the loss where every run knows them
    and shares the ratio; the legend gives each run's last ones.

    Args:
        run_directories: run directories, each with a ``metrics.jsonl``.
        output: the picture, ``.png``, ``.pdf`` or ``.svg``; its directory is made where it is missing.

    Returns:
        ``output`` as a path.

    Raises:
        InputError: for a run without metrics, a suffix that is not known, or a picture that cannot be written.
    """
    output = Path(output)
    check_suffix(output)
    return save(report_figure(run_directories), output)


def report_figure(run_directories: Sequence[str | Path]) -> Any:
    """The picture of :func:`draw_report`, a matplotlib figure that is drawn when it is saved."""
    # Drawn without pyplot: no window system, and nothing global is changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not run_directories:
        raise InputError("a report needs at least one run directory")
    runs = _read_runs([Path(directory) for directory in run_directories])

    rows = 3 if any(run.points("model_flops_utilization")[0].size for run in runs) else 2
    figure = Figure(figsize=(13, 1 + 3.75 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 2, sharex=True)
    figure.suptitle(_title(runs), fontsize=14, fontweight="bold")
    _draw_loss(panels[0, 0], runs)
    _draw_lines(panels[0, 1], runs, "learning_rate", "Learning rate", "learning rate", smooth=False, from_zero=True)
    _draw_lines(panels[1, 0], runs, "grad_norm", "Gradient norm (global, before clipping)", "L2 norm", log=True)
    _draw_lines(panels[1, 1], runs, "tokens_per_second", "Speed", "tokens per second", from_zero=True)
    if rows == 3:
        utilization = "share of what devices can do (%)"
        _draw_lines(
            panels[2, 0], runs, "model_flops_utilization", "MFU (model FLOPs utilization)", utilization,
            from_zero=True, factor=100.0,
        )  # fmt: skip
        _draw_lines(panels[2, 1], runs, "tflops_per_second", "Useful work", "TFLOP/s, all devices", from_zero=True)
    for panel in panels[-1]:
        panel.set_xlabel("step")
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.10)
    _draw_legend(figure, panels[0, 0], runs)
    return figure


def _read_runs(directories: list[Path]) -> list[_Run]:
    runs = []
    for directory, name in zip(directories, distinct_names(directories), strict=True):
        path = directory / "metrics.jsonl"
        if not path.exists():
            raise InputError(f"{directory} has no {path.name}; expected the directory of a run that has trained")
        records = read_metrics(path)
        if not records:
            raise InputError(f"{path} holds no step yet; wait for the first one, or leave this run out")
        runs.append(_Run(name, {key: _column(records, key) for key in _KEYS}))
    return runs


_KEYS = (
    "step", "loss", "held_out_loss", "held_out_bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second",
    "tflops_per_second", "model_flops_utilization",
)  # fmt: skip


def _column(records: list[dict[str, Any]], key: str) -> np.ndarray:
    values = (record.get(key) for record in records)
    return np.array([float("nan") if value is None else float(value) for value in values])


def distinct_names(directories: list[Path]) -> list[str]:
    """The last part of each path, or as many as it takes to tell them apart."""
    parts = [directory.resolve().parts for directory in directories]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return names


def _title(runs: list[_Run]) -> str:
    if len(runs) > 1:
        return f"Training of {len(runs)} runs"
    return f"Training of {runs[0].name}"


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a 50th of the steps, the window cut off at both ends. Shape (n,) to (n,)."""
    half = values.size // _SMOOTHED_SHARE // 2
    if half == 0:
        return values
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(values.size)
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, values.size)
    return (sums[last] - sums[first]) / (last - first)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _draw_curve(panel: Any, steps: np.ndarray, values: np.ndarray, colour: str, smooth: bool) -> None:
    smooth = smooth and values.size >= 2 * _SMOOTHED_SHARE
    if smooth:
        panel.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
    marker = "o" if values.size == 1 else None
    panel.plot(steps, _smoothed(values) if smooth else values, color=colour, linewidth=1.7, marker=marker, markersize=5)


def _draw_loss(panel: Any, runs: list[_Run]) -> None:
    style(panel, "Loss", "loss (nats per token)")
    limits = []
    for index, run in enumerate(runs):
        steps, values = run.points("loss")
        _draw_curve(panel, steps, values, _colour(index), smooth=True)
        held_out_steps, held_out = run.points("held_out_loss")
        panel.plot(
            held_out_steps, held_out, linestyle="none", marker="o", markersize=6.5, zorder=3,
            markerfacecolor="white", markeredgecolor=_colour(index), markeredgewidth=1.7,
        )  # fmt: skip
        limits += [*values, *held_out]
    if not limits:
        _say_unknown(panel)
        return
    ratios = [run.bits_per_byte_over_loss for run in runs]
    if all(ratio is not None and abs(ratio / ratios[0] - 1) < 0.01 for ratio in ratios):
        ratio = ratios[0]
        right = panel.secondary_yaxis("right", functions=(lambda loss: loss * ratio, lambda bits: bits / ratio))
        right.set_ylabel("bits per byte")


def _draw_lines(
    panel: Any,
    runs: list[_Run],
    key: str,
    title: str,
    label: str,
    *,
    smooth: bool = True,
    log: bool = False,
    from_zero: bool = False,
    factor: float = 1.0,
) -> None:
    style(panel, title, label)
    drawn = 0
    for index, run in enumerate(runs):
        steps, values = run.points(key)
        values = factor * values
        if log:
            steps, values = steps[values > 0], values[values > 0]
        drawn += values.size
        _draw_curve(panel, steps, values, _colour(index), smooth)
    if not drawn:
        _say_unknown(panel)
        return
    if log:
        _log_scale(panel)
    if from_zero:
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}")


def _log_scale(panel: Any) -> None:
    """A logarithmic axis whose ticks are plain numbers, several of them even within one decade."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    within_a_decade = high < 5 * low
    panel.yaxis.set_major_locator(MaxNLocator(6) if within_a_decade else LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_minor_formatter(NullFormatter())
    if within_a_decade:
        panel.yaxis.set_minor_locator(NullLocator())


def _say_unknown(panel: Any) -> None:
    panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center", va="center", color="#777777")


def _draw_legend(figure: Any, loss_panel: Any, runs: list[_Run]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for index, run in enumerate(runs):
        handles.append(Line2D([], [], color=_colour(index), linewidth=2.2, label=f"{run.name}: {_outcome(run)}"))
    figure.legend(handles=handles, loc="outside lower left", ncols=1, frameon=False, fontsize=10)
    keys = [Line2D([], [], color="#555555", linewidth=1.7, label="training")]
    if any(run.points("held_out_loss")[0].size for run in runs):
        keys.append(
            Line2D([], [], color="#555555", linestyle="none", marker="o", markerfacecolor="white", label="held out")
        )
    loss_panel.legend(handles=keys, loc="upper right", frameon=False, fontsize=9)


def _outcome(run: _Run) -> str:
    """Where a run stands, in words."""
    parts = [f"{run.columns['step'][-1]:.0f} steps"]
    for key, text in (
        ("loss", "training loss {:.3f}"),
        ("held_out_loss", "held-out loss {:.3f}"),
        ("held_out_bits_per_byte", "{:.3f} bits per byte"),
    ):
        _, values = run.points(key)
        if values.size:
            parts.append(text.format(values[-1]))
    return ", ".join(parts)
