"""The causal convolution as a plain loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv1d_reference(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    document_starts: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as ``kernels.conv1d.causal_conv1d``, with the state given."""
    dtype = initial_state.dtype
    window = initial_state
    outputs = []
    for token in range(inputs.shape[1]):
        if document_starts is not None:
            window = torch.where(document_starts[:, token, None, None], torch.zeros_like(window), window)
        taps = torch.cat([window, inputs[:, token, None].to(dtype)], dim=1)
        output = (taps * weight.to(dtype).mT).sum(1)
        if bias is not None:
            output = output + bias.to(dtype)
        outputs.append(torch.nn.functional.silu(output) if activation == "silu" else output)
        window = taps[:, 1:]
    return torch.stack(outputs, dim=1).to(inputs.dtype), window
