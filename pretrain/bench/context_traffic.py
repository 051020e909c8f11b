"""What the ranks of one layer send each other: counted in the calls that send it, beside the formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from kernels.segments import SCHEMES
from pretrain.bench import context_steps as steps
from pretrain.bench.context_processes import Processes
from pretrain.models.mixer_config import MixerConfig
from pretrain.models.registry import MixerFamily, sequence_mixers
from pretrain.models.segment_messages import SegmentTraffic, exchanged, handed_on

HIDDEN_SIZE = 32
TOKENS_PER_RANK = 8
_FLOAT32 = 4


@dataclass(frozen=True)
class TrafficRow:
    """One layer's messages, forward and backward, all ranks together, of one sequence.

    Attributes:
        mixer: its name.
        scheme: ``gather``, ``scan`` or ``chain``.
        ranks: that hold the sequence.
        counted: by the calls that sent them.
        formula: from the configuration alone.
    """

    mixer: str
    scheme: str
    ranks: int
    counted: SegmentTraffic
    formula: SegmentTraffic

    @property
    def agrees(self) -> bool:
        return self.counted == self.formula

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "mixer": self.mixer,
            "scheme": self.scheme,
            "ranks": self.ranks,
            "messages": self.counted.messages,
            "formula_messages": self.formula.messages,
            "bytes": self.counted.bytes,
            "formula_bytes": self.formula.bytes,
            "agrees": self.agrees,
        }


def example(family: MixerFamily) -> MixerConfig:
    """A small configuration; where iterations depend on a tolerance, one that always takes the first of them."""
    config = family.config.examples(HIDDEN_SIZE)[0]
    if "newton_tolerance" in family.config.model_fields:
        return config.model_copy(update={"newton_tolerance": 1e30})
    return config


def formula(family: MixerFamily, scheme: str, ranks: int) -> SegmentTraffic:
    """What the mixer's example says that its ranks receive, forward and backward."""
    config = example(family)
    if scheme != steps.CHAIN:
        messages = family.segment_messages(config, HIDDEN_SIZE, TOKENS_PER_RANK, _FLOAT32)
        return exchanged(messages, scheme, ranks)
    lengths = [rank * TOKENS_PER_RANK for rank in range(1, ranks)]
    return handed_on([family.cost(config, HIDDEN_SIZE, length, _FLOAT32, 1).state_bytes for length in lengths])


def count_traffic(
    groups: Mapping[int, Processes], mixers: Sequence[str], say: Callable[[str], object]
) -> list[TrafficRow]:
    """Counts the messages of each mixer's layer by every scheme that it has.

    Args:
        groups: of processes, by their number; one process sends nothing and is left out.
        mixers: names of registered sequence mixers.
        say: takes lines of progress.
    """
    rows = []
    for mixer in mixers:
        family = sequence_mixers()[mixer]
        schemes = [*(SCHEMES if family.config.exchanges_segments else ()), steps.CHAIN]
        say(f"messages of {mixer}")
        for ranks, processes in groups.items():
            if ranks == 1:
                continue
            processes.call(
                steps.hold_mixer,
                mixer=mixer,
                options=example(family).model_dump(),
                hidden_size=HIDDEN_SIZE,
                each=TOKENS_PER_RANK,
                schemes=schemes,
            )
            for scheme in schemes:
                counted = SegmentTraffic(0, 0.0)
                for received in processes.call(steps.received, name=scheme):
                    # How large a growing state is, is said ahead of it, in a few bytes that no formula counts.
                    found = [traffic for kind, traffic in received.items() if kind != "sizes"]
                    counted += SegmentTraffic(sum(count for count, _ in found), sum(size for _, size in found))
                rows.append(TrafficRow(mixer, scheme, ranks, counted, formula(family, scheme, ranks)))
    return rows


def traffic_table(rows: Sequence[TrafficRow]) -> Table:
    """Counted and computed side by side; a row that differs says so."""
    drawn = Table(
        title="What all ranks of one layer receive, forward and backward",
        caption=f"counted, and by formula; a sequence of {TOKENS_PER_RANK} tokens a rank, hidden size {HIDDEN_SIZE}",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("mixer", "scheme", "ranks", "messages", "formula", "bytes", "formula", ""):
        drawn.add_column(heading, justify="left" if heading in ("mixer", "scheme", "") else "right", no_wrap=True)
    for row in rows:
        figures = (row.counted.messages, row.formula.messages, row.counted.bytes, row.formula.bytes)
        differs = "" if row.agrees else "DIFFERS"
        drawn.add_row(row.mixer, row.scheme, str(row.ranks), *(f"{figure:,.0f}" for figure in figures), differs)
    return drawn
