"""Losses by position as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain.evaluate.by_position import LossAtLength
from pretrain.observe.picture import COLOURS, save, style

# Losses of the same labels differ by less than this share of them where nothing is gained or lost.
_NOTHING = 0.005


def position_text(results: Sequence[LossAtLength]) -> list[str]:
    """A table with a row for each bucket and a column for each length, and what it says, in lines."""
    spans = {(bucket.first, bucket.last) for result in results for bucket in result.buckets}
    lines = ["nats per token by position in the document" + " " * 4 + "rows of"]
    lines.append(f"  {'position':>17}" + "".join(f"{result.length:>10,}" for result in results))
    for first, last in sorted(spans):
        cells = []
        for result in results:
            own = [bucket.nats_per_token for bucket in result.buckets if bucket.first == first]
            cells.append(f"{own[0]:>10.4f}" if own else f"{'-':>10}")
        span = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        lines.append(f"  {span:>17}" + "".join(cells))
    lines.append(f"  {'all':>17}" + "".join(f"{result.nats_per_token:>10.4f}" for result in results))
    return lines + [line for result in results for line in _said(result)]


def _said(result: LossAtLength) -> list[str]:
    lines = []
    if result.beyond is not None:
        read_on, anew = result.beyond.nats_per_token, result.beyond.in_training_rows
        if read_on > anew * (1 + _NOTHING):
            meaning = "what lies further back does harm"
        elif read_on < anew * (1 - _NOTHING):
            meaning = "what lies further back helps"
        else:
            meaning = "what lies further back neither helps nor harms"
        lines.append(
            f"rows of {result.length:,}, the {result.beyond.labels:,} labels beyond the training length: "
            f"{read_on:.4f}, and {anew:.4f} where they are read in rows of the training length: {meaning}"
        )
    return lines


def draw_positions(results: Sequence[LossAtLength], trained: int, title: str, output: str | Path) -> Path:
    """Loss over position, a line for each length of rows, to ``.png``, ``.pdf`` or ``.svg``.

    Raises:
        InputError: for a suffix that is not known, or a picture that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    style(panel, title, "held-out loss (nats per token)")
    for index, result in enumerate(results):
        # The middle of a bucket; position 0 has no logarithm, so that positions are counted from 1.
        places = [((bucket.first + 1) * (bucket.last + 1)) ** 0.5 for bucket in result.buckets]
        losses = [bucket.nats_per_token for bucket in result.buckets]
        colour = COLOURS[index % len(COLOURS)]
        panel.plot(places, losses, color=colour, marker="o", markersize=4, label=f"rows of {result.length:,}")
    panel.axvline(trained, color="#777777", linestyle="--", linewidth=1, label=f"trained on rows of {trained:,}")
    panel.set_xscale("log", base=2)
    panel.set_xlabel("tokens of the document read so far")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.legend(frameon=False)
    return save(figure, output)
