"""The launches of the sLSTM, for compiling ahead of time."""

from __future__ import annotations

import torch

from kernels.launch import Launch
from kernels.slstm.sequential_triton import Problem, slstm_backward, slstm_forward
from kernels.slstm.state import zero_state

# The published xLSTM[7:1] of 1.3 billion parameters (4 heads, width 2048), and heads that one tile holds.
HEAD_SIZES = (512, 128)


def launches() -> list[Launch]:
    """Forward and backward of 4 heads of each size, 8 sequences of 2048 tokens, packed documents, bf16."""
    found: list[Launch] = []
    for size in HEAD_SIZES:
        gates = torch.empty(8, 2048, 4, 4, size, device="meta", dtype=torch.bfloat16)
        recurrent = torch.empty(4, 4, size, size, device="meta")
        starts = torch.empty(8, 2048, device="meta", dtype=torch.bool)
        state = zero_state(gates, torch.float32)
        problem = Problem.of(gates, has_documents=True)
        trajectory, *_ = slstm_forward(problem, gates, recurrent, recurrent[..., 0], tuple(state), starts, found.append)
        slstm_backward(problem, recurrent, trajectory, trajectory.means[:, 1:], state[1:], found.append)
    return found
