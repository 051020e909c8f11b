"""What a decoder of recurrent layers carries from call to call, and which tokens of a batch are read together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.models.modeling import State

States = list[State | None]


@dataclass
class RowGroup:
    """Sequences of a batch that begin with equally many padding tokens.

    Attributes:
        rows: their indices in the batch.
        padding: tokens before the first that counts.
        states: of each layer after the tokens read so far; None before the first.
    """

    rows: Tensor
    padding: int
    states: States | None = None


class RecurrentCache:
    """What the layers carry from one call to the next; a call returns a new one and leaves the given one as it is.

    Padding never enters a state: sequences with different padding are kept, and read, apart.
    """

    is_compileable = False

    def __init__(self, groups: list[RowGroup], tokens: int = 0):
        self.groups, self.tokens = groups, tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``i`` becomes what sequence ``beam_idx[i]`` was."""
        groups = []
        for group in self.groups:
            new_rows, members = (beam_idx.to(group.rows.device)[:, None] == group.rows).nonzero(as_tuple=True)
            if len(new_rows):
                groups.append(RowGroup(new_rows, group.padding, states_of(group.states, members)))
        self.groups = groups


def states_of(states: States | None, rows: Tensor) -> States | None:
    """The states of some sequences of a batch."""
    if states is None:
        return None
    return [None if state is None else {name: tensor[rows] for name, tensor in state.items()} for state in states]


def row_groups(attention_mask: Tensor | None, batch: int, device: torch.device) -> list[RowGroup]:
    """A batch's sequences by the padding before them."""
    if attention_mask is None:
        return [RowGroup(torch.arange(batch, device=device), 0)]
    padding = (attention_mask.cumsum(1) == 0).sum(1)
    return [
        RowGroup((padding == count).nonzero()[:, 0].to(device), int(count)) for count in padding.unique(sorted=True)
    ]


def check_mask(attention_mask: Tensor) -> None:
    """Raises ``ValueError`` unless a mask is two-dimensional and masks no token between two that it does not."""
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be (batch, tokens), 0 for padding, but has {attention_mask.dim()} dimensions; "
            f"documents of one sequence are kept apart by position_ids that begin anew with 0"
        )
    steps = attention_mask.long().diff(dim=1)
    if ((steps > 0) & (attention_mask.cumsum(1)[:, :-1] > 0)).any():
        raise ValueError("attention_mask masks tokens within a sequence; padding may only stand before or after it")


def document_starts(position_ids: Tensor | None, batch: int, options: dict[str, Any]) -> Tensor | None:
    """Where documents begin within a sequence, ``(batch, sequence)`` bool: at position 0; None where that is unsaid.

    Raises:
        ValueError: documents are told apart in another way alone.
    """
    if position_ids is None:
        others = sorted(name for name in ("seq_idx", "cu_seq_lens_q") if options.get(name) is not None)
        if others:
            raise ValueError(f"{others[0]} is not read here; give position_ids that begin anew with 0 in each document")
        return None
    return (position_ids == 0).expand(batch, -1)


@dataclass
class Documents:
    """Pieces of sequences, equally long, that are read together; each lies within one document.

    Attributes:
        rows: the sequence of each, within its group.
        begins: its first token there.
        length: tokens.
        goes_on: whether they go on from the states of their sequences.
        is_last: ``(pieces,)`` bool, whether a piece ends its sequence.
    """

    rows: Tensor
    begins: Tensor
    length: int
    goes_on: bool
    is_last: Tensor

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Indices of the pieces' tokens in ``(batch, sequence)``, each ``(pieces, length)``."""
        tokens = self.begins[:, None] + torch.arange(self.length, device=self.begins.device)
        return self.rows[:, None].expand_as(tokens), tokens


def split_documents(starts: Tensor, has_states: bool) -> list[Documents]:
    """Sequences cut where documents start; ``starts`` is ``(batch, sequence)`` bool, on any device."""
    found: dict[tuple[int, bool], list[tuple[int, int, bool]]] = {}
    length = starts.shape[1]
    for row, flags in enumerate(starts.tolist()):
        bounds = [0, *(place for place in range(1, length) if flags[place]), length]
        for begin, end in zip(bounds, bounds[1:], strict=False):
            goes_on = has_states and begin == 0 and not flags[0]
            found.setdefault((end - begin, goes_on), []).append((row, begin, end == length))
    documents = []
    for (size, goes_on), pieces in found.items():
        rows, begins, last = (torch.tensor(column, device=starts.device) for column in zip(*pieces, strict=True))
        documents.append(Documents(rows, begins, size, goes_on, last))
    return documents
