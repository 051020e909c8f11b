"""Documents -> samples of one length, whole: no document is cut that fits into a sample.

Best-fit-decreasing packing, as in Ding et al. 2024, "Fewer Truncations Improve Language Modeling": pieces, the longest
first, each go into the fullest sample that has room. Pieces of one length are alike, so whole groups of samples are
packed at once and the work depends on the number of different lengths, not of documents (the histogram idea of Krell
et al. 2021, "Efficient Sequence Packing without Cross-contamination").

A sample of S predictions has S + 1 places. A document of more tokens is cut into pieces of S + 1 that share one token,
so that each of its tokens is predicted once; only its last piece shares a sample with others.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.batch import Rows, SampleFormat
from data.documents import DocumentArrays, Piece, StoredDocuments, read_pieces, read_stream
from data.errors import DataError
from data.order import DOCUMENT_ORDER, SAMPLE_ORDER, permutation
from data.packing import EpochOrders, SourceSamples


@dataclass(frozen=True)
class Item:
    """Pieces of one length in each sample of a group: sample j takes pieces ``first + j * count`` and following."""

    length: int
    count: int
    first: int  # counted among the pieces of this length


@dataclass(frozen=True)
class Group:
    """Samples that are packed alike."""

    samples: int
    items: tuple[Item, ...]

    def parted(self, samples: int) -> tuple[Group, Group]:
        """Its first ``samples`` samples, and the others."""
        rest = tuple(Item(item.length, item.count, item.first + samples * item.count) for item in self.items)
        return Group(samples, self.items), Group(self.samples - samples, rest)

    def with_item(self, item: Item) -> Group:
        return Group(self.samples, (*self.items, item))


def pack_lengths(counts: np.ndarray, capacity: int) -> list[Group]:
    """Best-fit-decreasing packing of ``counts[l]`` pieces of each length l into samples of ``capacity`` places."""
    open_groups: dict[int, list[Group]] = {}  # by the places that are left in each of their samples
    rooms: list[int] = []  # the keys, ascending
    full: list[Group] = []

    def put(group: Group, room: int) -> None:
        if group.samples == 0:
            return
        if room == 0:
            full.append(group)
            return
        if room not in open_groups:
            bisect.insort(rooms, room)
            open_groups[room] = []
        open_groups[room].append(group)

    def take(length: int) -> tuple[Group, int] | None:
        """The fullest samples that have room for ``length``, and how much they have."""
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            return None
        room = rooms[place]
        group = open_groups[room].pop(0)
        if not open_groups[room]:
            del open_groups[room], rooms[place]
        return group, room

    for length in np.flatnonzero(counts)[::-1].tolist():
        left, first = int(counts[length]), 0
        while left:
            found = take(length)
            each = (capacity if found is None else found[1]) // length
            group, room = found or (Group(-(-left // each), ()), capacity)
            # After one piece a sample is fuller than the others, so the next piece of this length goes there too.
            whole = min(group.samples, left // each)
            filled, rest = group.parted(whole)
            if whole:
                put(filled.with_item(Item(length, each, first)), room - each * length)
                first, left = first + whole * each, left - whole * each
            if left and rest.samples:
                last, rest = rest.parted(1)
                put(last.with_item(Item(length, left, first)), room - left * length)
                first, left = first + left, 0
            put(rest, room)
    return full + [group for room in rooms for group in open_groups[room]]


class Packing:
    """Which pieces of documents each sample holds, for documents of given lengths; the same in every epoch."""

    def __init__(self, lengths: np.ndarray, capacity: int) -> None:
        """``lengths``: (D,) int64, at least 2 each: a mark and a token."""
        step = capacity - 1
        pieces = np.maximum(-(-(lengths - 1) // step), 1)
        self.capacity = capacity
        self.documents = np.repeat(np.arange(len(lengths)), pieces)  # (P,)
        before = np.cumsum(pieces) - pieces
        self.firsts = (np.arange(len(self.documents)) - before[self.documents]) * step  # (P,)
        self.lengths = np.minimum(lengths[self.documents] - self.firsts, capacity)  # (P,)
        counts = np.bincount(self.lengths, minlength=capacity + 1)
        self.length_starts = np.cumsum(counts) - counts
        self.groups = pack_lengths(counts, capacity)
        self.group_ends = np.cumsum([group.samples for group in self.groups])
        self.samples = int(self.group_ends[-1])

    def by_length(self, order: np.ndarray) -> np.ndarray:
        """(P,) numbers of pieces: those of one length together, within it as ``order`` has them."""
        return order[np.argsort(self.lengths[order], kind="stable")]

    @functools.cached_property
    def by_length_as_stored(self) -> np.ndarray:
        """(P,) ``by_length`` of the documents' own order."""
        return self.by_length(np.arange(len(self.lengths)))

    def pieces(self, by_length: np.ndarray, sample: int) -> np.ndarray:
        """Numbers of the pieces of one sample, the longest first."""
        number = int(np.searchsorted(self.group_ends, sample, side="right"))
        group = self.groups[number]
        within = sample - (int(self.group_ends[number]) - group.samples)
        parts = []
        for item in group.items:
            start = int(self.length_starts[item.length]) + item.first + within * item.count
            parts.append(by_length[start : start + item.count])
        return np.concatenate(parts)

    def read(
        self, documents: StoredDocuments | DocumentArrays, samples: Sequence[np.ndarray], boundary_id: int
    ) -> Rows:
        """The rows of samples of which each is given by the numbers of its pieces."""
        raw = np.full(len(samples) * self.capacity, boundary_id, dtype=documents.raw_type)
        starts = np.zeros(len(raw), dtype=bool)
        valid = np.zeros(len(samples), dtype=np.int64)
        wanted: list[Piece] = []
        for row, pieces in enumerate(samples):
            begin = position = row * self.capacity
            lengths, firsts = self.lengths[pieces].tolist(), self.firsts[pieces].tolist()
            for document, first, length in zip(self.documents[pieces].tolist(), firsts, lengths, strict=True):
                wanted.append((document, first, position, position + length))
                starts[position] = True
                position += length
            # Behind the last piece stands a mark, if there is room: the end of its document.
            valid[row] = min(position - begin, self.capacity - 1)
        read_pieces(documents, wanted, raw)
        shape = (len(samples), self.capacity)
        return Rows(raw.astype(np.int64).reshape(shape), valid, starts.reshape(shape))


@dataclass(frozen=True)
class _EpochOrder:
    by_length: np.ndarray  # (P,) numbers of pieces
    samples: np.ndarray  # (samples per epoch,)


class BestFitSamples(SourceSamples):
    """Training samples of whole documents. Sample i belongs to epoch i // samples_per_epoch.

    Which lengths share a sample is the same in every epoch; which documents of those lengths do, and the order of
    samples, is drawn anew in each.

    Attributes:
        padding_tokens: places of an epoch's samples that hold nothing.
    """

    samples_per_epoch: int

    def __init__(self, documents: StoredDocuments, format: SampleFormat, seed: int) -> None:
        """Raises ``DataError`` where there is no document."""
        self.documents, self.format, self.seed = documents, format, seed
        if not len(documents.lengths):
            raise DataError("the training split has no document; give more text.")
        self.packing = Packing(documents.lengths, format.sequence_length + 1)
        self.samples_per_epoch = self.packing.samples
        self.dropped_tokens = 0
        self.padding_tokens = self.samples_per_epoch * self.packing.capacity - int(self.packing.lengths.sum())
        self._orders = EpochOrders(self._make_order)

    def first_tokens(self, limit: int) -> np.ndarray:
        return read_stream(self.documents, limit)

    def rows(self, indices: list[int]) -> Rows:
        samples = []
        for index in indices:
            if index < 0:
                raise IndexError(f"sample {index}: samples are counted from 0")
            epoch, within = divmod(index, self.samples_per_epoch)
            order = self._orders[epoch]
            samples.append(self.packing.pieces(order.by_length, int(order.samples[within])))
        return self.packing.read(self.documents, samples, self.format.boundary_id)

    def _make_order(self, epoch: int) -> _EpochOrder:
        pieces = permutation(len(self.packing.lengths), self.seed, epoch, DOCUMENT_ORDER)
        samples = permutation(self.samples_per_epoch, self.seed, epoch, SAMPLE_ORDER)
        return _EpochOrder(self.packing.by_length(pieces), samples)
