"""The launches of the causal convolution at the widths of 7B models, for compiling ahead of time."""

from __future__ import annotations

import torch

from kernels.conv1d.tiles_triton import conv1d_backward, conv1d_forward
from kernels.launch import Launch


def launches() -> list[Launch]:
    """Forward and backward: Mamba-2 at 7B, 10240 channels, 8192 tokens, packed documents, bf16."""
    batch, sequence, channels, width = 1, 8192, 10240, 4
    inputs = torch.empty(batch, sequence, channels, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(width, channels, device="meta")
    bias = torch.empty(channels, device="meta")
    state = torch.empty(batch, width - 1, channels, device="meta")
    since = torch.empty(batch, sequence, device="meta", dtype=torch.int32)
    found: list[Launch] = []
    outputs = conv1d_forward(inputs, weight, bias, state, since, True, found.append)
    conv1d_backward(inputs, weight, bias, state, since, outputs, state, True, found.append)
    return found
