"""Which positions begin chunks, and the chunks of all sequences of a batch in one row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """The chunks that begin within one call, those of all sequences one after the other.

    Sequences have different numbers of chunks. In one row they need no padding; a chunk at which a document, or the
    next sequence, begins says so, and whatever reads the row restarts its state there.

    Attributes:
        row, position: ``(chunks,)`` int64, the sequence and the position at which each begins.
        counts: ``(batch,)`` int64, how many each sequence has.
        begins_document: ``(chunks,)`` bool, first of a document, or of a sequence that no state came into.
        latest: ``(batch, sequence)`` int64, place in the row of the chunk that each position belongs to; -1 where
            that began before this call.
    """

    row: Tensor
    position: Tensor
    counts: Tensor
    begins_document: Tensor
    latest: Tensor

    @property
    def offsets(self) -> Tensor:
        """``(batch,)`` int64, place in the row of each sequence's first chunk, or where it would be."""
        return self.counts.cumsum(0) - self.counts

    @property
    def begins_sequence(self) -> Tensor:
        """``(chunks,)`` bool, the first of each sequence in this call."""
        first = torch.ones_like(self.begins_document)
        first[1:] = self.row[1:] != self.row[:-1]
        return first

    def gather(self, hidden: Tensor) -> Tensor:
        """Of ``(sequence, batch, size)`` the vectors at which chunks begin, ``(chunks, size)``."""
        return hidden[self.position, self.row]


def find_chunks(chosen: Tensor, starts: Tensor | None, continues: bool) -> Chunks:
    """The chunks that boundaries make.

    Args:
        chosen: ``(batch, sequence)`` bool, where chunks begin.
        starts: ``(batch, sequence)`` bool, first tokens of documents, each of which is chosen; None: none here.
        continues: whether sequences go on from an earlier call; else a chunk begins at each one's first position.
    """
    # Row by row. On a GPU this waits: how long the row is must be known here.
    row, position = chosen.nonzero(as_tuple=True)
    counts = chosen.sum(1)
    within = chosen.cumsum(1)
    latest = (within + (counts.cumsum(0) - counts)[:, None] - 1).masked_fill(within == 0, -1)
    begins = torch.zeros_like(position, dtype=torch.bool) if starts is None else starts[row, position]
    if not continues:
        begins = begins | (position == 0)
    return Chunks(row, position, counts, begins, latest)
