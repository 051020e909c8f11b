"""The state-space recurrence as a plain loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_reference(
    values: Tensor,
    step_size: Tensor,
    decay_rate: Tensor,
    keys: Tensor,
    queries: Tensor,
    skip: Tensor | None,
    initial_state: Tensor,
    document_starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as ``kernels.ssd.ssd``, with the state given."""
    dtype, state = initial_state.dtype, initial_state
    heads_per_group = values.shape[2] // keys.shape[2]
    steps, x = step_size.to(dtype), values.to(dtype)
    by_head = [tensor.to(dtype).repeat_interleave(heads_per_group, dim=2) for tensor in (keys, queries)]
    outputs = []
    for token in range(values.shape[1]):
        if document_starts is not None:
            state = torch.where(document_starts[:, token, None, None, None], torch.zeros_like(state), state)
        key, query = (tensor[:, token, :, None, :] for tensor in by_head)
        step = steps[:, token, :, None, None]
        decay = torch.exp(step * decay_rate.to(dtype)[:, None, None])
        state = decay * state + step * x[:, token, :, :, None] * key
        output = (state * query).sum(-1)
        if skip is not None:
            output = output + skip.to(dtype)[:, None] * x[:, token]
        outputs.append(output)
    return torch.stack(outputs, dim=1).to(values.dtype), state
