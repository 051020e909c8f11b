"""What a run reads: one source's packed samples, or those of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from data.batch import Batch, Rows, SampleFormat
from data.mixture import MixtureOrder, Phase, phases_after_change
from data.packing import PackedSamples, SourceSamples


class Samples(Protocol):
    """Samples that are computed from their indices alone."""

    format: SampleFormat

    def batch(self, indices: Iterable[int]) -> Batch:
        """The samples of ``indices``. Raises ``IndexError`` for a negative index."""

    def first_tokens(self, limit: int) -> np.ndarray:
        """(at most ``limit``,) int64: tokens of the documents in their stored order."""

    def close(self) -> None:
        """Ends what runs in the background."""


class HeldOutSamples(Samples, Protocol):
    """Samples of which there is a number; further indices are padding."""

    samples_per_epoch: int

    def with_length(self, length: int) -> HeldOutSamples:
        """The same documents in samples of ``length`` tokens."""


class _SeveralSources:
    """Samples of which each comes from one of several sources, all of one tokenizer and one length."""

    def __init__(self, sources: Mapping[str, SourceSamples]) -> None:
        self.sources = dict(sorted(sources.items()))
        self.format = next(iter(self.sources.values())).format

    def close(self) -> None:
        """Ends what runs in the background."""
        for samples in self.sources.values():
            samples.close()

    def _batch(self, located: Sequence[tuple[str, int]]) -> Batch:
        rows = self.format.padding(len(located))
        starts = None
        for name, samples in self.sources.items():
            places = [place for place, (source, _) in enumerate(located) if source == name]
            if not places:
                continue
            own = samples.rows([located[place][1] for place in places])
            rows.tokens[places], rows.valid[places] = own.tokens, own.valid
            if own.starts is not None:
                starts = np.zeros(rows.tokens.shape, dtype=bool) if starts is None else starts
                starts[places] = own.starts
        return self.format.batch(Rows(rows.tokens, rows.valid, starts))

    def _first_tokens(self, limits: Mapping[str, int]) -> np.ndarray:
        return np.concatenate([samples.first_tokens(limits[name]) for name, samples in self.sources.items()])


class MixtureSamples(_SeveralSources):
    """Training samples of a mixture; see ``data.mixture`` for the order."""

    def __init__(self, sources: Mapping[str, SourceSamples], phases: Sequence[Phase], seed: int) -> None:
        super().__init__(sources)
        self.seed = seed
        self.order = MixtureOrder(phases, seed)

    def go_on(self, recorded: Sequence[Phase], position: int) -> None:
        """Continues a run that read ``position`` samples under ``recorded``; the configured weights hold from there."""
        self.order = MixtureOrder(phases_after_change(recorded, self.order.phases, position), self.seed)

    def batch(self, indices: Iterable[int]) -> Batch:
        """The samples of ``indices``. Raises ``IndexError`` for a negative index."""
        return self._batch([self.order.locate(index) for index in indices])

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source was read through by the mixture's first ``position`` samples."""
        consumed = self.order.consumed(position)
        return {name: samples.epochs(consumed.get(name, 0)) for name, samples in self.sources.items()}

    def bookmarks(self, position: int) -> dict[str, dict[str, Any]]:
        """The bookmark of each source that makes one, for the mixture's sample ``position``."""
        consumed = self.order.consumed(position)
        found = {name: samples.bookmark(consumed.get(name, 0)) for name, samples in self.sources.items()}
        return {name: bookmark for name, bookmark in found.items() if bookmark is not None}

    def first_tokens(self, limit: int) -> np.ndarray:
        """(at most ``limit``,) int64: of each source its share by the first weights, one source behind the other."""
        weights = self.order.phases[0].weights
        total = sum(weights.values())
        return self._first_tokens({name: int(limit * weights.get(name, 0.0) / total) for name in self.sources})


class ConcatenatedSamples(_SeveralSources):
    """Held-out samples of several sources, one source behind the other; indices behind the last are padding."""

    def __init__(self, sources: Mapping[str, PackedSamples]) -> None:
        super().__init__(sources)
        self.samples_per_epoch = sum(samples.samples_per_epoch for samples in sources.values())

    def batch(self, indices: Iterable[int]) -> Batch:
        """The samples of ``indices``. Raises ``IndexError`` for a negative index."""
        return self._batch([self._locate(index) for index in indices])

    def source_of(self, index: int) -> str:
        """The name of the source that a sample comes from."""
        return self._locate(index)[0]

    def with_length(self, length: int) -> ConcatenatedSamples:
        """The same documents in samples of ``length`` tokens."""
        return ConcatenatedSamples({name: samples.with_length(length) for name, samples in self.sources.items()})

    def _locate(self, index: int) -> tuple[str, int]:
        for name, samples in self.sources.items():
            if index < samples.samples_per_epoch:
                return name, index
            index -= samples.samples_per_epoch
        return name, samples.samples_per_epoch

    def first_tokens(self, limit: int) -> np.ndarray:
        """(at most ``limit``,) int64: equal parts of each source."""
        return self._first_tokens(dict.fromkeys(self.sources, limit // len(self.sources)))
