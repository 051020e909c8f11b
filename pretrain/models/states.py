"""Recurrent states of several sequences, joined and taken apart by rows of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pretrain.models.mixer import State


def join_rows(states: Sequence[Mapping[str, State]]) -> dict[str, State]:
    """States of several batches as those of one.

    Of a tensor that grows the newest entries are last, and zeros in front of them are entries that do not count.
    """
    joined: dict[str, State] = {}
    for layer, state in states[0].items():
        joined[layer] = {}
        for name in state:
            tensors = [of_batch[layer][name] for of_batch in states]
            longest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
            joined[layer][name] = torch.cat([_padded_in_front(tensor, longest) for tensor in tensors])
    return joined


def _padded_in_front(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """``tensor`` with zeros in front until its dimensions after the first have these sizes."""
    missing = [most - size for most, size in zip(sizes, tensor.shape[1:], strict=True)]
    # Torch takes the last dimension first.
    return torch.nn.functional.pad(tensor, [edge for amount in reversed(missing) for edge in (amount, 0)])


def select_rows(states: Mapping[str, State], rows: Sequence[int] | Tensor) -> dict[str, State]:
    """The states of some sequences of a batch, in the order asked for."""
    return {layer: {name: tensor[rows] for name, tensor in state.items()} for layer, state in states.items()}
