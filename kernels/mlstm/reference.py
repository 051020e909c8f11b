"""The mLSTM as a plain loop over tokens: slow, differentiable, and what the fast forms must equal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kernels.mlstm.state import MLSTMState, compute_dtype, zero_state


def mlstm_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_state: MLSTMState | None = None,
    document_starts: Tensor | None = None,
    epsilon: float = 1e-6,
) -> tuple[Tensor, MLSTMState]:
    """Token-by-token mLSTM (Beck et al. 2024, "xLSTM", arXiv:2405.04517, equations 19-27, stabilised).

    Shapes and meaning as in ``kernels.mlstm.mlstm``. Computes in float32, or in float64 if an input is
    float64; give it float64 inputs to use it as the truth.
    """
    dtype = compute_dtype(query, key, value, input_gate, forget_gate)
    scaled_query = query.to(dtype) * query.shape[-1] ** -0.5
    keys, values, input_gate = key.to(dtype), value.to(dtype), input_gate.to(dtype)
    log_forget = logsigmoid(forget_gate.to(dtype))
    state = zero_state(query, value) if initial_state is None else initial_state
    matrix, normalizer, stabilizer = (tensor.to(dtype) for tensor in state)
    outputs = []
    for token in range(query.shape[1]):
        if document_starts is not None:
            starts = document_starts[:, token, None]
            matrix = matrix.masked_fill(starts[..., None, None], 0.0)
            normalizer = normalizer.masked_fill(starts[..., None], 0.0)
            stabilizer = stabilizer.masked_fill(starts, 0.0)
        decayed = log_forget[:, token] + stabilizer
        stabilizer = torch.maximum(decayed, input_gate[:, token])
        forget = torch.exp(decayed - stabilizer)[..., None]
        written_key = torch.exp(input_gate[:, token] - stabilizer)[..., None] * keys[:, token]
        matrix = forget[..., None] * matrix + written_key[..., None] * values[:, token, :, None, :]
        normalizer = forget * normalizer + written_key
        numerator = torch.einsum("bhkv,bhk->bhv", matrix, scaled_query[:, token])
        normalizer_read = (normalizer * scaled_query[:, token]).sum(-1)
        denominator = torch.maximum(normalizer_read.abs(), torch.exp(-stabilizer)) + epsilon
        outputs.append(numerator / denominator[..., None])
    return torch.stack(outputs, dim=1).to(value.dtype), MLSTMState(matrix, normalizer, stabilizer)
