"""The launches of the mLSTM at the head shapes of xLSTM-7B, for compiling ahead of time."""

from __future__ import annotations

import torch

from kernels.launch import Launch
from kernels.mlstm.chunkwise_triton import mlstm_backward, mlstm_forward
from kernels.mlstm.state import zero_state
from kernels.mlstm.triton_problem import Problem


def launches() -> list[Launch]:
    """Forward and backward: 8 heads of 256 x 512, 8192 tokens, packed documents, bf16."""
    batch, sequence, heads, query_key_size, value_size = 1, 8192, 8, 256, 512
    options = {"device": "meta", "dtype": torch.bfloat16}
    query = torch.empty(batch, sequence, heads, query_key_size, **options)
    value = torch.empty(batch, sequence, heads, value_size, **options)
    gate = torch.empty(batch, sequence, heads, device="meta")
    starts = torch.empty(batch, sequence, device="meta", dtype=torch.bool)
    state = zero_state(query, value)
    found: list[Launch] = []
    problem = Problem.of(query, value, chunk=64, epsilon=1e-6, has_documents=True)
    output, _, denominator, gates = mlstm_forward(problem, query, query, value, gate, gate, state, starts, found.append)
    mlstm_backward(
        problem, query, query, value, gate, state.matrix, state.normalizer, output, denominator, gates,
        output, state, found.append,
    )  # fmt: skip
    return found
