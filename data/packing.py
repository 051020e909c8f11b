"""Documents -> samples of one length: concatenate them in an epoch's order and split.

Sample k of an epoch reads positions k*S to k*S + S - 1 of the concatenated tokens (S = sequence length) and
predicts positions k*S + 1 to k*S + S, so neighbouring samples share one token and every token but the epoch's
first is predicted exactly once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from data.documents import StoredDocuments, read_stream
from data.errors import DataError
from data.order import DOCUMENT_ORDER, SAMPLE_ORDER, permutation

# The label where nothing is to be predicted; torch's cross entropy ignores it by default.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """Samples as the model reads them. B rows, S = sequence length."""

    tokens: torch.Tensor  # (B, S) int64
    labels: torch.Tensor  # (B, S) int64: the next token, or IGNORED_LABEL in padding
    document_starts: torch.Tensor  # (B, S) bool: the model's state restarts before this token
    label_bytes: int  # raw bytes that the labels stand for; boundary marks stand for none
    label_count: int  # labels that are not ignored, boundary marks included

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``."""
        return Batch(
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            document_starts=self.document_starts.to(device, non_blocking=non_blocking),
            label_bytes=self.label_bytes,
            label_count=self.label_count,
        )


def document_starts(rows: np.ndarray, boundary_id: int) -> np.ndarray:
    """Where the state restarts: at every mark, and at the first token, since nothing is carried between samples."""
    starts = rows == boundary_id
    starts[:, 0] = True
    return starts


def make_batch(rows: np.ndarray, valid: np.ndarray, boundary_id: int, token_byte_lengths: np.ndarray) -> Batch:
    """A batch of (B, S + 1) tokens of which the first ``valid[b]`` predictions of each row count."""
    labels = rows[:, 1:].copy()
    label_count = int(valid.sum())
    label_bytes = token_byte_lengths[labels].sum()
    if label_count < labels.size:
        # Padding is the boundary mark, which stands for no bytes, so label_bytes is right already.
        labels[np.arange(labels.shape[1]) >= valid[:, None]] = IGNORED_LABEL
    return Batch(
        tokens=torch.from_numpy(rows[:, :-1].copy()),
        labels=torch.from_numpy(labels),
        document_starts=torch.from_numpy(document_starts(rows, boundary_id)[:, :-1].copy()),
        label_bytes=int(label_bytes),
        label_count=label_count,
    )


@dataclass(frozen=True)
class _EpochOrder:
    """One epoch: documents in reading order and where each starts in the concatenation, samples in order."""

    documents: np.ndarray | None  # (D,) numbers of the documents in reading order, or None for 0, 1, 2, ...
    stream_starts: np.ndarray  # (D + 1,) where it starts in the concatenation
    samples: np.ndarray | None  # (samples per epoch,) or None for 0, 1, 2, ...


class PackedSamples:
    """Samples of one split, each computed on demand from its index alone.

    Shuffled (training): sample i belongs to epoch i // samples_per_epoch, for any i >= 0. Each epoch orders
    the documents and the samples anew; the tokens behind its last full sample (``dropped_tokens``, fewer than
    a sample, other ones each epoch) are not read in that epoch.

    Not shuffled (held out): ``samples_per_epoch`` samples in the stored order, once through, nothing dropped:
    the last is padded. Further indices give rows of padding only, with which every rank of a distributed
    evaluation can run the same number of equal micro-batches.
    """

    def __init__(
        self,
        documents: StoredDocuments,
        sequence_length: int,
        boundary_id: int,
        token_byte_lengths: np.ndarray,
        seed: int,
        shuffled: bool,
    ) -> None:
        """Raises ``DataError`` when the documents do not fill one sample (shuffled) or predict no token."""
        self.documents = documents
        self.sequence_length = sequence_length
        self.boundary_id = boundary_id
        self.token_byte_lengths = token_byte_lengths
        self.seed = seed
        self.shuffled = shuffled
        predicted = documents.counts.tokens - 1
        if predicted < (sequence_length if shuffled else 1):
            raise DataError(
                f"the {'training' if shuffled else 'held-out'} split has {documents.counts.tokens} tokens,"
                f" fewer than one sample of data.sequence_length {sequence_length} + 1 needs; give more text"
                " or lower data.sequence_length."
            )
        if shuffled:
            self.samples_per_epoch = predicted // sequence_length
            self.dropped_tokens = predicted % sequence_length
        else:
            self.samples_per_epoch = -(-predicted // sequence_length)
            self.dropped_tokens = 0
        self._orders: dict[int, _EpochOrder] = {}
        self._orders_lock = threading.Lock()

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (S + 1,) int64 and document starts (S + 1,) bool of one sample: inputs and the last label.

        ``starts[0]`` is always True: no state is carried from one sample to the next. Padding is filled with
        the boundary mark. Raises ``IndexError`` for a negative index.
        """
        rows, _ = self.rows([index])
        return rows[0], document_starts(rows, self.boundary_id)[0]

    def batch(self, indices: Iterable[int]) -> Batch:
        """The samples of ``indices`` as one batch. Raises ``IndexError`` for a negative index."""
        rows, valid = self.rows(list(indices))
        return make_batch(rows, valid, self.boundary_id, self.token_byte_lengths)

    def first_tokens(self, limit: int) -> np.ndarray:
        """(at most ``limit``,) int64: documents in their stored order."""
        return read_stream(self.documents, limit)

    def rows(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(B, S + 1) int64 tokens of the samples, padded with the mark, and (B,) how many labels each has."""
        length = self.sequence_length
        total = self.documents.counts.tokens
        rows = np.full((len(indices), length + 1), self.boundary_id, dtype=np.int64)
        valid = np.zeros(len(indices), dtype=np.int64)
        for row, index in enumerate(indices):
            if index < 0:
                raise IndexError(f"sample {index}: samples are counted from 0")
            if self.shuffled:
                epoch, within = divmod(index, self.samples_per_epoch)
            elif index < self.samples_per_epoch:
                epoch, within = 0, index
            else:
                continue
            order = self._order(epoch)
            start = int(within if order.samples is None else order.samples[within]) * length
            end = min(start + length + 1, total)
            self._read(order, start, end, rows[row])
            valid[row] = end - start - 1
        return rows, valid

    def _read(self, order: _EpochOrder, start: int, end: int, out: np.ndarray) -> None:
        """Copies positions start to end - 1 of the concatenation to the front of ``out``, as int64."""
        place = int(np.searchsorted(order.stream_starts, start, side="right")) - 1
        position = start
        while position < end:
            document = place if order.documents is None else int(order.documents[place])
            piece_end = min(end, int(order.stream_starts[place + 1]))
            first = position - int(order.stream_starts[place])
            self.documents.read(document, first, out[position - start : piece_end - start])
            position = piece_end
            place += 1

    def _order(self, epoch: int) -> _EpochOrder:
        # Two epochs are kept because a batch may straddle them; the lock is for threads that read ahead.
        with self._orders_lock:
            order = self._orders.get(epoch)
            if order is None:
                while len(self._orders) >= 2:
                    del self._orders[min(self._orders)]
                order = self._orders[epoch] = self._make_order(epoch)
            return order

    def _make_order(self, epoch: int) -> _EpochOrder:
        lengths = self.documents.lengths
        documents = samples = None
        if self.shuffled:
            documents = permutation(len(lengths), self.seed, epoch, DOCUMENT_ORDER)
            samples = permutation(self.samples_per_epoch, self.seed, epoch, SAMPLE_ORDER)
            lengths = lengths[documents]
        stream_starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=stream_starts[1:])
        return _EpochOrder(documents, stream_starts, samples)
