"""Rotary positions (Su et al. 2021, "RoFormer", arXiv 2104.09864), in the layout of transformers.

A head's first ``size`` channels are rotated in pairs that lie half of ``size`` apart; the others stay.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.models.attention.config import RotaryScaling


def frequencies(size: int, base: float, scaling: RotaryScaling | None, device: torch.device) -> Tensor:
    """Radians per token of each pair, ``(size / 2,)`` float32."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    found = 1.0 / base**exponents
    if scaling is None:
        return found
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    per_context = scaling.original_context * found / (2 * math.pi)
    kept = ((per_context - low) / (high - low)).clamp(0.0, 1.0)
    return found * (kept + (1.0 - kept) / scaling.factor)


def angles(positions: Tensor, size: int, base: float, scaling: RotaryScaling | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each ``(batch, sequence, 1, size / 2)`` float32, of ``(batch, sequence)`` positions."""
    turned = positions.float()[..., None, None] * frequencies(size, base, scaling, positions.device)
    return turned.cos(), turned.sin()


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotates ``(batch, sequence, heads, channels)`` in float32; the same shape and dtype."""
    half = cosines.shape[-1]
    first, second, rest = heads.split((half, half, heads.shape[-1] - 2 * half), dim=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return torch.cat([*(part.to(heads.dtype) for part in turned), rest], dim=-1)
