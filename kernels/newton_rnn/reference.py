"""Any cell as a plain loop over tokens: slow, differentiable, and what the fast forms must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.newton_rnn.cell import Cell


def recurrence_reference(
    cell: Cell, inputs: Tensor, parameters: Sequence[Tensor], initial: Tensor, document_starts: Tensor | None
) -> Tensor:
    """All states, (batch, sequence, ...), of ``cell`` from ``initial`` (batch, ...), in the dtype of ``initial``."""
    state = initial.unsqueeze(1)
    states = []
    # Split once: the gradient of a slice per token would be as long as the sequence, for every token.
    for token, value in enumerate(inputs.to(initial.dtype).split(1, dim=1)):
        if document_starts is not None:
            starts = document_starts[:, token].view(-1, *[1] * (state.dim() - 1))
            state = state.masked_fill(starts, 0.0)
        state = cell.step(state, value, parameters)
        states.append(state)
    return torch.cat(states, dim=1)
