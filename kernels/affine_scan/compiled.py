"""The launches of the affine scan at the channels of a 7B model, for compiling ahead of time."""

from __future__ import annotations

import torch

from kernels.affine_scan.triton_launches import affine_scan_backward, affine_scan_forward
from kernels.launch import Launch


def launches() -> list[Launch]:
    """Forward and backward with 1, 2 and 3 components: 4096 channels, 8192 tokens, packed documents, bf16."""
    batch, sequence, channels = 1, 8192, 4096
    found: list[Launch] = []
    for components in ((), (2,), (3,)):
        options = {"device": "meta", "dtype": torch.bfloat16}
        coefficients = torch.empty(batch, sequence, *components, *components, channels, **options)
        inputs = torch.empty(batch, sequence, *components, channels, **options)
        initial = torch.empty(batch, *components, channels, device="meta")
        cuts = torch.empty(batch, sequence, device="meta", dtype=torch.bool)
        states = affine_scan_forward(coefficients, inputs, initial, cuts, False, found.append)
        affine_scan_backward(coefficients, states, initial, cuts, states, False, found.append)
    return found
