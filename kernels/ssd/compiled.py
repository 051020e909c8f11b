"""The launches of the state-space recurrence at the shapes of Mamba-2 7B, for compiling ahead of time."""

from __future__ import annotations

import torch

from kernels.launch import Launch
from kernels.ssd.chunkwise_triton import ssd_backward, ssd_forward
from kernels.ssd.triton_launches import prepare
from kernels.ssd.triton_problem import Problem


def launches(chunk: int = 128, head_size: int = 64, state_size: int = 128) -> list[Launch]:
    """Forward and backward: 128 heads in 8 groups, 8192 tokens, packed documents, bf16."""
    batch, sequence, heads, groups = 1, 8192, 128, 8
    options = {"device": "meta", "dtype": torch.bfloat16}
    values = torch.empty(batch, sequence, heads, head_size, **options)
    keys = torch.empty(batch, sequence, groups, state_size, **options)
    steps = torch.empty(batch, sequence, heads, device="meta")
    per_head = torch.empty(heads, device="meta")
    starts = torch.empty(batch, sequence, device="meta", dtype=torch.bool)
    state = torch.empty(batch, heads, head_size, state_size, device="meta")
    problem = Problem.of(values, keys, chunk, has_documents=True, has_skip=True)
    inputs = prepare(problem, values, steps, per_head, keys, keys, per_head, starts)
    found: list[Launch] = []
    outputs, final = ssd_forward(problem, inputs, state, found.append)
    ssd_backward(problem, inputs, per_head, state, outputs, final, found.append)
    return found
