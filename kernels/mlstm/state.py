"""The recurrent state of the mLSTM cell and the checks on its inputs that all backends share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MLSTMState(NamedTuple):
    """What one mLSTM head carries from one token to the next, stabilised by ``exp(-stabilizer)``.

    The state in unstabilised terms is ``matrix * exp(stabilizer)`` and ``normalizer * exp(stabilizer)``.
    All three tensors are float32 (float64 where the inputs are float64). The zero state has stabilizer 0.
    """

    matrix: Tensor  # (batch, heads, query_key_size, value_size)
    normalizer: Tensor  # (batch, heads, query_key_size)
    stabilizer: Tensor  # (batch, heads)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of states and arithmetic: float64 if any of the tensors is float64, otherwise float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def zero_state(query: Tensor, value: Tensor) -> MLSTMState:
    """The state before the first token: matrix 0, normalizer 0 and stabilizer 0 (not minus infinity).

    Args:
        query: (batch, sequence, heads, query_key_size).
        value: (batch, sequence, heads, value_size).
    """
    batch, _, heads, query_key_size = query.shape
    options = {"dtype": compute_dtype(query, value), "device": query.device}
    return MLSTMState(
        torch.zeros(batch, heads, query_key_size, value.shape[-1], **options),
        torch.zeros(batch, heads, query_key_size, **options),
        torch.zeros(batch, heads, **options),
    )


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_state: MLSTMState | None,
    document_starts: Tensor | None,
    chunk_size: int,
) -> None:
    """Raise ``ValueError`` for the first input whose shape, dtype or value does not fit; see ``mlstm``."""
    if query.dim() != 4 or query.shape[1] < 1:
        raise ValueError(
            "mlstm: query must have shape (batch, sequence, heads, query_key_size) with at least one token, "
            f"got {tuple(query.shape)}."
        )
    batch, sequence, heads, query_key_size = query.shape
    if value.dim() != 4:
        raise ValueError(
            f"mlstm: value must have shape (batch, sequence, heads, value_size), got {tuple(value.shape)}."
        )
    expected = {
        "key": (key, (batch, sequence, heads, query_key_size)),
        "value": (value, (batch, sequence, heads, value.shape[3])),
        "input_gate": (input_gate, (batch, sequence, heads)),
        "forget_gate": (forget_gate, (batch, sequence, heads)),
    }
    if initial_state is not None:
        matrix_shape = (batch, heads, query_key_size, value.shape[3])
        expected["initial_state.matrix"] = (initial_state.matrix, matrix_shape)
        expected["initial_state.normalizer"] = (initial_state.normalizer, matrix_shape[:3])
        expected["initial_state.stabilizer"] = (initial_state.stabilizer, matrix_shape[:2])
    if document_starts is not None:
        expected["document_starts"] = (document_starts, (batch, sequence))
        if document_starts.dtype != torch.bool:
            raise ValueError(
                f"mlstm: document_starts must be bool (True at each document's first token), "
                f"got {document_starts.dtype}."
            )
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"mlstm: {name} must have shape {shape}, got {tuple(tensor.shape)}.")
        if tensor.device != query.device:
            raise ValueError(f"mlstm: {name} is on {tensor.device} but query is on {query.device}; move it there.")
    if chunk_size < 1:
        raise ValueError(f"mlstm: chunk_size must be at least 1, got {chunk_size}.")
