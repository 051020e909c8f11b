"""What ranks that hold segments of the same sequences send each other, from configurations alone. Imports no torch.

``kernels.segments`` sends the messages; ``pretrain bench context`` counts them beside these formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

FLOAT32 = 4


@dataclass(frozen=True)
class SegmentMessage:
    """What each rank says in one call of one mixer, for one sequence, all tensor-parallel ranks together.

    Attributes:
        to: ``before``: to be combined over the segments in front, by the scheme of the layout
            (:class:`kernels.segments.PartsTold`); ``next``: to the rank that holds the next segment; ``everyone``.
        forward, backward: bytes; 0: nothing is sent.
        times: how often it is said.
    """

    to: Literal["before", "next", "everyone"]
    forward: float
    backward: float
    times: int = 1

    def forward_only(self) -> SegmentMessage:
        """The same without what its gradient takes."""
        return replace(self, backward=0)


@dataclass(frozen=True)
class SegmentTraffic:
    """What all ranks of a group receive together.

    Attributes:
        messages: from one rank to another; of a call to everyone one to each.
        bytes: of them.
    """

    messages: int
    bytes: float

    def __add__(self, other: SegmentTraffic) -> SegmentTraffic:
        return SegmentTraffic(self.messages + other.messages, self.bytes + other.bytes)

    def __mul__(self, count: int) -> SegmentTraffic:
        return SegmentTraffic(self.messages * count, self.bytes * count)


def _rounds(ranks: int) -> int:
    """Of a scan, beside its first message."""
    return max(ranks - 2, 0).bit_length()


def exchanged(messages: Sequence[SegmentMessage], scheme: str, ranks: int) -> SegmentTraffic:
    """Forward and backward together, of one sequence.

    Args:
        messages: of each rank.
        scheme: ``gather`` or ``scan``.
        ranks: that hold the sequence.
    """
    # Of a scan: how many ranks find another one at the distance of each round.
    rounds = [ranks - 1] + [ranks - 1 - (1 << power) for power in range(_rounds(ranks))]
    pairs = {"next": ranks - 1, "everyone": ranks * (ranks - 1)}
    pairs["before"] = pairs["everyone"] if scheme == "gather" else sum(rounds)
    total = SegmentTraffic(0, 0.0)
    for message in messages:
        for size in (message.forward, message.backward):
            if size:
                total += SegmentTraffic(1, size) * pairs[message.to] * message.times
    return total


def kept(messages: Sequence[SegmentMessage], scheme: str, ranks: int) -> float:
    """Bytes that the last rank keeps for the backward pass of what others said, of one sequence.

    Summaries of all segments, or both sides of each round; keys and values of all segments in front; windows.
    """
    copies = {"before": ranks if scheme == "gather" else 2 * _rounds(ranks) + 1, "next": 1, "everyone": ranks - 1}
    return sum(copies[message.to] * message.forward for message in messages if message.forward and message.backward)


def handed_on(state_bytes: Sequence[float]) -> SegmentTraffic:
    """Of a chain: a state forward and its gradient back.

    Args:
        state_bytes: of one sequence, at the end of every segment but the last.
    """
    return SegmentTraffic(2 * len(state_bytes), 2 * sum(state_bytes))


def window_before(channels: int, width: int) -> SegmentMessage:
    """What a convolution over ``channels`` with ``width`` taps says: its last inputs, float32."""
    size = FLOAT32 * channels * (width - 1)
    return SegmentMessage("next", size, size)
