"""The recurrent state of the sLSTM cell and the checks on its inputs that all backends share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The logarithm of an empty normalizer, finite so that no difference of two of them is undefined.
EMPTY = -1e30


class SLSTMState(NamedTuple):
    """What the sLSTM carries from one token to the next: four tensors (batch, heads, head_size).

    The state in unstabilised terms is ``cell * exp(stabilizer)`` and ``normalizer * exp(stabilizer)``. An element
    whose normalizer is 0 is empty: the next token sets it as the first one does, whatever its cell and stabilizer.
    All are float32 (float64 where the inputs are float64). The zero state is zero throughout.
    """

    hidden: Tensor
    cell: Tensor
    normalizer: Tensor
    stabilizer: Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of states and arithmetic: float64 if any of the tensors is float64, otherwise float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def zero_state(gates: Tensor, dtype: torch.dtype) -> SLSTMState:
    """The state before the first token, for gates (batch, sequence, 4, heads, head_size)."""
    batch, _, _, heads, size = gates.shape
    return SLSTMState(*(torch.zeros(batch, heads, size, dtype=dtype, device=gates.device) for _ in SLSTMState._fields))


def to_mean_and_logarithm(state: SLSTMState) -> tuple[Tensor, Tensor, Tensor]:
    """The state as the fast forms carry it, differentiably.

    Returns:
        ``cell / normalizer``, the logarithm of the unstabilised normalizer, and the stabilizer; of an empty
        element 0, EMPTY and EMPTY, which the next token replaces.
    """
    empty = state.normalizer == 0
    normalizer = state.normalizer.masked_fill(empty, 1.0)
    mean = (state.cell / normalizer).masked_fill(empty, 0.0)
    logarithm = (state.stabilizer + torch.log(normalizer)).masked_fill(empty, EMPTY)
    return mean, logarithm, state.stabilizer.masked_fill(empty, EMPTY)


def from_mean_and_logarithm(hidden: Tensor, mean: Tensor, logarithm: Tensor, stabilizer: Tensor) -> SLSTMState:
    """The inverse of ``to_mean_and_logarithm`` after a token, when nothing is empty."""
    normalizer = torch.exp(logarithm - stabilizer)
    return SLSTMState(hidden, mean * normalizer, normalizer, stabilizer)


def check_inputs(
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    initial_state: SLSTMState | None,
    document_starts: Tensor | None,
) -> None:
    """Raise ``ValueError`` for the first input whose shape, dtype or device does not fit; see ``slstm``."""
    if gates.dim() != 5 or gates.shape[1] < 1 or gates.shape[2] != 4:
        raise ValueError(
            "slstm: gates must have shape (batch, sequence, 4, heads, head_size) with at least one token, "
            f"got {tuple(gates.shape)}."
        )
    batch, sequence, _, heads, size = gates.shape
    expected = {"recurrent": (recurrent, (4, heads, size, size)), "bias": (bias, (4, heads, size))}
    if initial_state is not None:
        for name, tensor in initial_state._asdict().items():
            expected[f"initial_state.{name}"] = (tensor, (batch, heads, size))
    if document_starts is not None:
        expected["document_starts"] = (document_starts, (batch, sequence))
        if document_starts.dtype != torch.bool:
            raise ValueError(
                "slstm: document_starts must be bool (True at each document's first token), "
                f"got {document_starts.dtype}."
            )
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"slstm: {name} must have shape {shape}, got {tuple(tensor.shape)}.")
        if tensor.device != gates.device:
            raise ValueError(f"slstm: {name} is on {tensor.device} but gates are on {gates.device}; move it there.")
