"""The affine scan as a plain loop over tokens: slow, differentiable, and what the fast forms must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.affine_scan.arguments import compute_dtype, restarts


def affine_scan_reference(
    coefficients: Tensor, inputs: Tensor, initial: Tensor | None, document_starts: Tensor | None, reverse: bool
) -> Tensor:
    """h_t = A_t h_{t-1} + b_t token by token; shapes and meaning as in ``kernels.affine_scan.affine_scan``."""
    dtype = compute_dtype(coefficients, inputs, initial)
    state_shape = (inputs.shape[0], *inputs.shape[2:])
    state = inputs.new_zeros(state_shape, dtype=dtype) if initial is None else initial.to(dtype)
    cuts = restarts(document_starts, reverse)
    order = range(inputs.shape[1])
    states = []
    for token in reversed(order) if reverse else order:
        if cuts is not None:
            state = state.masked_fill(cuts[:, token].view(-1, *[1] * (state.dim() - 1)), 0.0)
        matrix = coefficients[:, token].to(dtype)
        if inputs.dim() == 3:
            state = matrix * state + inputs[:, token]
        else:
            state = torch.einsum("bijd,bjd->bid", matrix, state) + inputs[:, token]
        states.append(state)
    if reverse:
        states.reverse()
    return torch.stack(states, dim=1).to(inputs.dtype)
