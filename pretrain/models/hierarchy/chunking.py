"""Which positions begin chunks, and the chunks of all sequences of a batch in one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.models.mixer import Documents, State
from pretrain.models.states import join_rows, select_rows

# A network on ``(sequence, batch, size)`` that keeps states; returns the same shape and the states after it.
Network = Callable[[Tensor, "dict[str, State] | None", Documents], "tuple[Tensor, dict[str, State]]"]


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

    def row_of_documents(self, outer: Documents | None) -> Documents:
        """Where documents begin in the row of chunks, and how many chunks each sequence has.

        Args:
            outer: of the positions that were chunked, all of them at their beginning; None: each row is a sequence.
        """
        counts = self.counts
        if outer is not None and outer.sequence_lengths is not None:
            # The row that was chunked holds several sequences itself.
            ends = self.latest[0, outer.sequence_lengths.cumsum(0) - 1] + 1
            counts = ends.diff(prepend=ends.new_zeros(1))
        return Documents((self.begins_sequence | self.begins_document)[None], sequence_lengths=counts)

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


def read_by_counts(
    network: Network, vectors: Tensor, begins_document: Tensor, counts: Tensor, states: dict[str, State] | None
) -> tuple[Tensor, dict[str, State]]:
    """A network over the vectors of sequences that each have a state: those with equally many go through it together.

    Args:
        network: as wide at its end as at its beginning.
        vectors: ``(vectors, size)``, those of all sequences one after the other.
        begins_document: ``(vectors,)`` bool, at which of them the network's state restarts.
        counts: ``(batch,)`` int64, how many each sequence has.
        states: of the network; None where every sequence begins here, and none of them has no vector.

    Returns:
        ``(vectors, size)``, and the states in the order of the sequences.
    """
    offsets = counts.cumsum(0) - counts
    outputs, order, finals = torch.zeros_like(vectors), [], []
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        order.append(rows)
        before = None if states is None else select_rows(states, rows)
        if count == 0:
            finals.append(before)
            continue
        places = offsets[rows] + torch.arange(count, device=rows.device)[:, None]
        read, after = network(vectors[places], before, Documents(begins_document[places].t()))
        outputs = outputs.index_put((places,), read)
        finals.append(after)
    return outputs, select_rows(join_rows(finals), torch.cat(order).argsort())
