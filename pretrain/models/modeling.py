"""Layers that the mixers' ``modeling.py`` share.

These files are shipped with exported models, beside weights that no class of ``transformers`` can hold. They are
written in torch alone, for reading and for fine-tuning rather than for speed, and have the parameter names of the
modules that were trained. Of this package they may import only each other (``pretrain.models.*.modeling``); such an
import is rewritten when they are copied.

A module's ``float32_parameters`` names those of its own parameters that training uses in float32 whatever the dtype of
its activations: in a model of another dtype they stay float32 too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
# What flows from layer to layer beside the hidden states, ``(batch, sequence, channels)`` float32 by name. A class that
# takes part has an attribute ``carried``, name -> channels, is called with all of it, and returns all of it.
Carried = dict[str, Tensor]


def empty_parameter(*shape: int) -> nn.Parameter:
    """A parameter whose values are loaded later."""
    return nn.Parameter(torch.empty(shape))


def all_float32_parameters(model: nn.Module) -> list[str]:
    """Full names of all parameters that stay float32, whatever the dtype of the model."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "float32_parameters", ())
        if getattr(module, name, None) is not None
    ]


class Projections(nn.Module):
    """Several linear maps of one input, the map ``name`` with the weight ``name_weight``."""

    def __init__(self, input_size: int, sizes: Mapping[str, int]):
        super().__init__()
        self.names = tuple(sizes)
        for name, size in sizes.items():
            self.register_parameter(f"{name}_weight", empty_parameter(size, input_size))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Maps ``(..., input_size)`` to one ``(..., size)`` per map."""
        return tuple(nn.functional.linear(hidden, getattr(self, f"{name}_weight")) for name in self.names)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, reduced in float32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    float32_parameters = ("weight",)

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = empty_parameter(size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape and dtype as ``hidden``, whose last dimension is normalised."""
        normed = nn.functional.rms_norm(hidden.float(), self.weight.shape, self.weight.float(), self.epsilon)
        return normed.to(hidden.dtype)


class LayerNorm(RMSNorm):
    """Layer norm with a weight and no bias, reduced in float32 (Ba et al. 2016, arXiv 1607.06450)."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape and dtype as ``hidden``, whose last dimension is normalised."""
        normed = nn.functional.layer_norm(hidden.float(), self.weight.shape, self.weight.float(), eps=self.epsilon)
        return normed.to(hidden.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class GroupedRMSNorm(nn.Module):
    """RMS norm over each of several equal groups of channels, with one weight per channel."""

    float32_parameters = ("weight",)

    def __init__(self, size: int, groups: int, epsilon: float):
        super().__init__()
        self.groups, self.epsilon = groups, epsilon
        self.weight = empty_parameter(size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(..., size)`` to the same shape, float32."""
        grouped = hidden.float().unflatten(-1, (self.groups, -1))
        normed = nn.functional.rms_norm(grouped, grouped.shape[-1:], eps=self.epsilon)
        return normed.flatten(-2) * self.weight.float()


def head_layer_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Layer norm of each head by itself, without bias.

    Args:
        hidden: ``(..., heads, size)``.
        weight: one per channel of all heads.

    Returns:
        ``(..., heads * size)`` float32.
    """
    normed = nn.functional.layer_norm(hidden.float(), hidden.shape[-1:], eps=epsilon)
    return normed.flatten(-2) * weight.float()


def causal_convolution(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution over this token and those before it.

    Args:
        inputs: ``(batch, sequence, channels)``.
        weight: ``(channels, width)``; its last column multiplies the token itself.
        bias: ``(channels,)`` or None.
        window: the ``width - 1`` inputs before these, ``(batch, width - 1, channels)`` float32; None: zeros.

    Returns:
        Outputs in float32, and the window of the next call.
    """
    batch, sequence, channels = inputs.shape
    width = weight.shape[-1]
    if window is None:
        window = inputs.new_zeros(batch, width - 1, channels, dtype=torch.float32)
    extended = torch.cat([window, inputs.float()], 1)
    bias = None if bias is None else bias.float()
    outputs = nn.functional.conv1d(extended.mT, weight.float()[:, None], bias, groups=channels).mT
    return outputs, extended[:, sequence:]
