"""Which source each sample of a mixture comes from: a pure function of the weights and the sample's index.

Sample k of a source of weight w (the weights sum to 1) is due at time (k + u) / w, where u in (0, 1) is drawn once
for each source; the mixture is all of them in the order of their times. After n samples a source has given n w of
them, but for less than one sample for each source, and where sample n lies follows from n alone: no state is
carried, and nothing before n needs to be looked at.

The weights may change at given samples (phases). Each source goes on where it stopped, so that no change of weights
repeats or leaves out a sample.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import DataError
from data.order import MIXTURE_OFFSETS, random_fraction

_BLOCK = 4096


@dataclass(frozen=True)
class Phase:
    """Weights that hold from one sample on.

    Attributes:
        first: the mixture's first sample under these weights.
        weights: one for each source that takes part, by name; above 0, of any sum.
    """

    first: int
    weights: dict[str, float]


def phases_after_change(recorded: Sequence[Phase], configured: Sequence[Phase], position: int) -> list[Phase]:
    """What a run goes on with that read ``position`` samples under ``recorded`` and is now told ``configured``.

    What was read stays as it was; from ``position`` on the configuration holds.
    """
    past = [phase for phase in recorded if phase.first < position]
    current = max((phase for phase in configured if phase.first <= position), key=lambda phase: phase.first)
    future = [phase for phase in configured if phase.first > position]
    if past and past[-1].weights == current.weights:
        return [*past, *future]
    return [*past, Phase(position, current.weights), *future]


class MixtureOrder:
    """The order of a mixture's samples, for any index."""

    def __init__(self, phases: Sequence[Phase], seed: int) -> None:
        """Raises ``DataError`` for no phase, one that does not start after the one before, or a weight not above 0."""
        if not phases or phases[0].first != 0:
            raise DataError("a mixture needs weights from its first sample on; give data.mixture at least one source.")
        self.phases = list(phases)
        self.names = sorted({name for phase in phases for name in phase.weights})
        self._segments: list[_Segment] = []
        consumed = dict.fromkeys(self.names, 0)
        for phase, following in zip(phases, [*phases[1:], None], strict=True):
            if following is not None and following.first <= phase.first:
                raise DataError(f"the mixture's weights change twice at sample {following.first}; merge the two.")
            segment = _Segment(phase, self.names, dict(consumed), seed)
            self._segments.append(segment)
            if following is not None:
                consumed = segment.consumed_after(following.first - phase.first)

    def locate(self, index: int) -> tuple[str, int]:
        """Source and index within that source of the mixture's sample ``index``."""
        if index < 0:
            raise IndexError(f"sample {index}: samples are counted from 0")
        segment = self._segment(index)
        source, within = segment.locate(index - segment.phase.first)
        return self.names[source], within

    def consumed(self, position: int) -> dict[str, int]:
        """How many samples of each source the first ``position`` samples of the mixture are."""
        segment = self._segment(position)
        return segment.consumed_after(position - segment.phase.first)

    def _segment(self, index: int) -> _Segment:
        place = bisect.bisect_right(self._segments, index, key=lambda segment: segment.phase.first) - 1
        return self._segments[place]


class _Segment:
    """One phase: samples counted from its first."""

    def __init__(self, phase: Phase, names: Sequence[str], before: dict[str, int], seed: int) -> None:
        self.phase, self.names, self.before = phase, names, before
        for name, weight in phase.weights.items():
            if not weight > 0:
                raise DataError(f"the weight of {name} in data.mixture is {weight}; give one above 0, or leave it out.")
        # In the order of names, which does not depend on the order in which a file lists them.
        self.sources = np.array([names.index(name) for name in sorted(phase.weights)], dtype=np.int64)
        weights = np.array([phase.weights[name] for name in sorted(phase.weights)], dtype=np.float64)
        self.weights = weights / weights.sum()
        self.offsets = np.array([random_fraction(seed, MIXTURE_OFFSETS, name) for name in sorted(phase.weights)])
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the source, and index within it."""
        block, place = divmod(index, _BLOCK)
        sources, within = self._block(block)
        source = int(self.sources[sources[place]])
        return source, self.before[self.names[source]] + int(within[place])

    def consumed_after(self, count: int) -> dict[str, int]:
        """Samples of each source before this phase's sample ``count``, earlier phases included."""
        consumed = dict(self.before)
        block, place = divmod(count, _BLOCK)
        starts = self._counts_before(block * _BLOCK)
        sources, _ = self._block(block)
        within = np.bincount(sources[:place], minlength=len(self.sources))
        for source, number in zip(self.sources.tolist(), (starts + within).tolist(), strict=True):
            consumed[self.names[source]] += number
        return consumed

    def _times(self, source: int, samples: np.ndarray) -> np.ndarray:
        return (samples + self.offsets[source]) / self.weights[source]

    def _due_before(self, time: float) -> np.ndarray:
        """How many samples of each source are due before ``time``."""
        counts = np.maximum(np.ceil(time * self.weights - self.offsets), 0).astype(np.int64)
        for source, count in enumerate(counts.tolist()):
            # The product above is rounded; the times themselves decide.
            while count > 0 and self._times(source, np.float64(count - 1)) >= time:
                count -= 1
            while self._times(source, np.float64(count)) < time:
                count += 1
            counts[source] = count
        return counts

    def _merge(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sources and indices of samples ``start`` to ``start + length - 1``, and the counts before ``start``."""
        several = len(self.sources)
        # Before time t there are t samples, give or take one for each source.
        early = self._due_before(max(float(start - several), 0.0))
        skipped = start - int(early.sum())
        ahead = np.ceil((length + 3 * several) * self.weights).astype(np.int64) + 2
        sources = np.repeat(np.arange(several), ahead)
        within = np.concatenate([first + np.arange(more) for first, more in zip(early, ahead, strict=True)])
        times = np.concatenate(
            [self._times(s, (first + np.arange(more)).astype(np.float64)) for s, (first, more) in
             enumerate(zip(early, ahead, strict=True))]
        )  # fmt: skip
        order = np.lexsort((sources, times))[: skipped + length]
        before = early + np.bincount(sources[order[:skipped]], minlength=several)
        order = order[skipped:]
        return sources[order], within[order], before

    def _counts_before(self, start: int) -> np.ndarray:
        return self._merge(start, 1)[2]

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        # The lock is for threads that read ahead.
        with self._lock:
            found = self._blocks.get(block)
            if found is None:
                sources, within, _ = self._merge(block * _BLOCK, _BLOCK)
                while len(self._blocks) >= 2:
                    del self._blocks[min(self._blocks)]
                found = self._blocks[block] = (sources, within)
            return found
