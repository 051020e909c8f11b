"""The launches of the Newton solvers at the channels of a 7B model, for compiling ahead of time."""

from __future__ import annotations

import torch

from kernels.launch import Launch
from kernels.newton_rnn.newton_torch import Settings
from kernels.newton_rnn.newton_triton import newton_backward, newton_forward


def launches() -> list[Launch]:
    """Forward and backward of the GRU and the LSTM: 4096 channels, 8192 tokens, packed documents, bf16."""
    batch, sequence, channels = 1, 8192, 4096
    found: list[Launch] = []
    gates = torch.empty(batch, sequence, 3, channels, device="meta", dtype=torch.bfloat16)
    hidden = torch.empty(batch, sequence, channels, device="meta", dtype=torch.bfloat16)
    cuts = torch.empty(batch, sequence, device="meta", dtype=torch.bool)
    for components, rows in (((), (3,)), ((2,), (3, 2))):
        parameters = [torch.empty(count, channels, device="meta") for count in rows]
        initial = torch.empty(batch, *components, channels, device="meta")
        states, _ = newton_forward(gates, parameters, initial, cuts, Settings(3, 8, None), found.append)
        newton_backward(gates, parameters, initial, cuts, states, hidden, initial, found.append)
    return found
