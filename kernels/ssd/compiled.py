"""The launches of the state-space recurrence at the shapes of 7B models, for compiling ahead of time."""

from __future__ import annotations

import torch

from kernels.launch import Launch
from kernels.ssd.chunkwise_triton import prepare, ssd_backward, ssd_forward
from kernels.ssd.triton_problem import Problem


def launches() -> list[Launch]:
    """Forward and backward: 128 heads of 64 with a state of 128, 8 groups, 8192 tokens, packed documents, bf16."""
    batch, sequence, heads, head_size, groups, state_size = 1, 8192, 128, 64, 8, 128
    options = {"device": "meta", "dtype": torch.bfloat16}
    values = torch.empty(batch, sequence, heads, head_size, **options)
    keys = torch.empty(batch, sequence, groups, state_size, **options)
    steps = torch.empty(batch, sequence, heads, device="meta")
    per_head = torch.empty(heads, device="meta")
    starts = torch.empty(batch, sequence, device="meta", dtype=torch.bool)
    state = torch.empty(batch, heads, head_size, state_size, device="meta")
    found: list[Launch] = []
    problem = Problem.of(values, keys, chunk=256, has_documents=True)
    inputs = prepare(problem, values, steps, per_head, keys, keys, per_head, starts)
    outputs, _ = ssd_forward(problem, inputs, state, found.append)
    ssd_backward(problem, inputs, state, outputs, state, found.append)
    return found
