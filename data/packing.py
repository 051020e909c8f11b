"""Documents -> samples of one length: concatenate them in an epoch's order and split.

Sample k of an epoch reads positions k*S to k*S + S - 1 of the concatenated tokens (S = sequence length) and
predicts positions k*S + 1 to k*S + S, so neighbouring samples share one token and every token but the epoch's
first is predicted exactly once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from data.batch import Batch, Rows, SampleFormat
from data.documents import Piece, StoredDocuments, read_pieces, read_stream
from data.errors import DataError
from data.order import DOCUMENT_ORDER, SAMPLE_ORDER, permutation

Order = TypeVar("Order")


class SourceSamples:
    """Samples of one source, each computed from its index.

    Attributes:
        format: how long samples are and what their ids mean.
        samples_per_epoch: how many samples read the source through once; None where nobody has counted.
    """

    format: SampleFormat
    samples_per_epoch: int | None

    def rows(self, indices: list[int]) -> Rows:
        """The samples of ``indices``. Raises ``IndexError`` for a negative index."""
        raise NotImplementedError(f"{type(self).__name__} must find its samples")

    def first_tokens(self, limit: int) -> np.ndarray:
        """(at most ``limit``,) int64: tokens of the documents in their stored order."""
        raise NotImplementedError(f"{type(self).__name__} must read its documents")

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (S + 1,) int64 and document starts (S + 1,) bool of one sample: inputs and the last label.

        ``starts[0]`` is True unless the sample goes on where another one ended. Padding is filled with the boundary
        mark. Raises ``IndexError`` for a negative index.
        """
        rows = self.rows([index])
        return rows.tokens[0], self.format.document_starts(rows)[0]

    def batch(self, indices: Iterable[int]) -> Batch:
        """The samples of ``indices`` as one batch. Raises ``IndexError`` for a negative index."""
        return self.format.batch(self.rows(list(indices)))

    def epochs(self, position: int) -> float:
        """How often the first ``position`` samples read the source through."""
        return position / self.samples_per_epoch if self.samples_per_epoch else 0.0

    def bookmark(self, position: int) -> dict[str, Any] | None:
        """What helps to find sample ``position`` quickly in another process, as JSON; None where nothing is needed."""
        return None

    def go_on(self, bookmark: dict[str, Any]) -> None:
        """Takes a bookmark that another process made; before the first sample is read."""
        raise AssertionError(f"{type(self).__name__} makes no bookmarks")

    def close(self) -> None:
        """Ends what runs in the background."""


class EpochOrders(Generic[Order]):
    """The order of each epoch, made when it is first asked for; the two newest are kept."""

    def __init__(self, make: Callable[[int], Order]) -> None:
        self._make = make
        self._orders: dict[int, Order] = {}
        self._lock = threading.Lock()

    def __getitem__(self, epoch: int) -> Order:
        # Two, because a batch may straddle epochs; the lock is for threads that read ahead.
        with self._lock:
            order = self._orders.get(epoch)
            if order is None:
                while len(self._orders) >= 2:
                    del self._orders[min(self._orders)]
                order = self._orders[epoch] = self._make(epoch)
            return order


@dataclass(frozen=True)
class _EpochOrder:
    """One epoch: documents in reading order and where each starts in the concatenation, samples in order."""

    documents: np.ndarray | None  # (D,) numbers of the documents in reading order, or None for 0, 1, 2, ...
    stream_starts: np.ndarray  # (D + 1,) where it starts in the concatenation
    samples: np.ndarray | None  # (samples per epoch,) or None for 0, 1, 2, ...

    def add_pieces(self, start: int, end: int, target: int, pieces: list[Piece]) -> None:
        """Adds what positions start to end - 1 of the concatenation are made of, to be copied to ``target``."""
        place = int(self.stream_starts.searchsorted(start, side="right")) - 1
        # Plain numbers, since arithmetic on NumPy's is several times slower; one more than a row often needs.
        starts = self.stream_starts[place : place + 8].tolist()
        shift, known = target - start, place
        while start < end:
            if place + 1 - known >= len(starts):
                known = place
                starts = self.stream_starts[place : place + 64].tolist()
            piece_end = min(end, starts[place + 1 - known])
            document = place if self.documents is None else int(self.documents[place])
            pieces.append((document, start - starts[place - known], start + shift, piece_end + shift))
            start = piece_end
            place += 1


class PackedSamples(SourceSamples):
    """Samples of one split, each computed on demand from its index alone.

    Shuffled (training): sample i belongs to epoch i // samples_per_epoch, for any i >= 0. Each epoch orders
    the documents and the samples anew; the tokens behind its last full sample (``dropped_tokens``, fewer than
    a sample, other ones each epoch) are not read in that epoch.

    Contiguous (training with states that go on from step to step): each of ``contiguous_rows`` = R rows of a batch
    reads a part of its own of the epoch's concatenation, from its beginning to its end. Of the T samples of a part,
    sample i of the epoch is number i // R of row i % R, so that it goes on where sample i - R ended; the first of each
    part begins anew. Documents are in a new order in each epoch. Not read are the tokens behind the last part, fewer
    than R samples.

    Not shuffled (held out): ``samples_per_epoch`` samples in the stored order, once through, nothing dropped:
    the last is padded. Further indices give rows of padding only, with which every rank of a distributed
    evaluation can run the same number of equal micro-batches.
    """

    samples_per_epoch: int

    def __init__(
        self,
        documents: StoredDocuments,
        format: SampleFormat,
        seed: int,
        shuffled: bool,
        contiguous_rows: int | None = None,
    ) -> None:
        """Raises ``DataError`` when the documents do not fill one sample (shuffled), or two in each contiguous row, or
        predict no token."""
        self.documents, self.format = documents, format
        self.seed, self.shuffled, self.contiguous_rows = seed, shuffled, contiguous_rows
        length = format.sequence_length
        predicted = documents.counts.tokens - 1
        if predicted < (length if shuffled else 1):
            raise DataError(
                f"the {'training' if shuffled else 'held-out'} split has {documents.counts.tokens} tokens,"
                f" fewer than one sample of data.sequence_length {length} + 1 needs; give more text"
                " or lower data.sequence_length."
            )
        self.samples_per_epoch = predicted // length if shuffled else -(-predicted // length)
        if contiguous_rows is not None:
            if self.samples_per_epoch < 2 * contiguous_rows:
                raise DataError(
                    f"the training split has {self.samples_per_epoch} samples of data.sequence_length {length}, too few"
                    f" for train.carry_state, which needs two or more for each of {contiguous_rows} rows of a batch;"
                    " give more text, lower data.sequence_length or train.global_batch_size, or leave out"
                    " train.carry_state."
                )
            self.samples_per_epoch -= self.samples_per_epoch % contiguous_rows
        self.dropped_tokens = predicted - self.samples_per_epoch * length if shuffled else 0
        self.padding_tokens = 0 if shuffled else self.samples_per_epoch * length - predicted
        self._orders = EpochOrders(self._make_order)

    def with_length(self, length: int) -> PackedSamples:
        """The same documents in samples of ``length`` tokens, in the stored order."""
        return PackedSamples(self.documents, replace(self.format, sequence_length=length), self.seed, shuffled=False)

    def first_tokens(self, limit: int) -> np.ndarray:
        return read_stream(self.documents, limit)

    def rows(self, indices: list[int]) -> Rows:
        width, total = self.format.sequence_length + 1, self.documents.counts.tokens
        raw = np.full(len(indices) * width, self.format.boundary_id, dtype=self.documents.raw_type)
        valid = np.zeros(len(indices), dtype=np.int64)
        goes_on = np.zeros(len(indices), dtype=bool) if self.contiguous_rows is not None else None
        pieces: list[Piece] = []
        for row, index in enumerate(indices):
            if index < 0:
                raise IndexError(f"sample {index}: samples are counted from 0")
            if self.shuffled:
                epoch, within = divmod(index, self.samples_per_epoch)
            elif index < self.samples_per_epoch:
                epoch, within = 0, index
            else:
                continue
            order = self._orders[epoch]
            start = int(within if order.samples is None else order.samples[within]) * (width - 1)
            end = min(start + width, total)
            order.add_pieces(start, end, row * width, pieces)
            valid[row] = end - start - 1
            if goes_on is not None:
                goes_on[row] = within >= self.contiguous_rows
        read_pieces(self.documents, pieces, raw)
        return Rows(raw.astype(np.int64).reshape(-1, width), valid, goes_on=goes_on)

    def _make_order(self, epoch: int) -> _EpochOrder:
        lengths = self.documents.lengths
        documents = samples = None
        if self.shuffled:
            documents = permutation(len(lengths), self.seed, epoch, DOCUMENT_ORDER)
            if self.contiguous_rows is None:
                samples = permutation(self.samples_per_epoch, self.seed, epoch, SAMPLE_ORDER)
            else:
                samples = np.arange(self.samples_per_epoch).reshape(self.contiguous_rows, -1).T.ravel()
            lengths = lengths[documents]
        stream_starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=stream_starts[1:])
        return _EpochOrder(documents, stream_starts, samples)
