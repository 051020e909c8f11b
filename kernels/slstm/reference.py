"""The sLSTM as a plain loop over tokens in its published, stabilised form: what the fast forms must equal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kernels.slstm.state import SLSTMState, compute_dtype, zero_state


def slstm_reference(
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    initial_state: SLSTMState | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, SLSTMState]:
    """Token-by-token sLSTM (Beck et al. 2024, "xLSTM", arXiv:2405.04517, equations 8-17).

    Shapes and meaning as in ``kernels.slstm.slstm``. Computes in float32, or in float64 if an input is float64;
    give it float64 inputs to use it as the truth.
    """
    dtype = compute_dtype(gates, recurrent, bias)
    state = zero_state(gates, dtype) if initial_state is None else initial_state
    hidden, cell, normalizer, stabilizer = (tensor.to(dtype) for tensor in state)
    inputs, recurrent = gates.to(dtype) + bias.to(dtype), recurrent.to(dtype)
    outputs = []
    for token in range(gates.shape[1]):
        if document_starts is not None:
            starts = document_starts[:, token, None, None]
            hidden, cell, normalizer, stabilizer = (
                tensor.masked_fill(starts, 0.0) for tensor in (hidden, cell, normalizer, stabilizer)
            )
        raw = inputs[:, token] + torch.einsum("ghde,bhe->bghd", recurrent, hidden)
        input_gate, forget_gate, candidate, output_gate = raw.unbind(1)
        decayed = logsigmoid(forget_gate) + stabilizer
        # In an element that nothing was written to there is nothing to decay.
        empty = normalizer == 0
        stabilizer = torch.where(empty, input_gate, torch.maximum(input_gate, decayed))
        write = torch.exp(input_gate - stabilizer)
        keep = torch.exp(torch.where(empty, -torch.inf, decayed - stabilizer))
        cell = keep * cell + write * torch.tanh(candidate)
        normalizer = keep * normalizer + write
        hidden = torch.sigmoid(output_gate) * cell / normalizer
        outputs.append(hidden)
    return torch.stack(outputs, dim=1).to(gates.dtype), SLSTMState(hidden, cell, normalizer, stabilizer)
