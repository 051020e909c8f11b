"""Rotary positions (Su et al. 2021, "RoFormer", arXiv 2104.09864), in the layout of transformers.

A head's first ``size`` channels are rotated in pairs that lie half of ``size`` apart; the others stay.
"""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions: Tensor, size: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each ``(batch, sequence, 1, size / 2)`` float32, of ``(batch, sequence)`` positions."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    turned = positions.float()[..., None, None] * (1.0 / base**exponents)
    return turned.cos(), turned.sin()


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotates ``(batch, sequence, heads, channels)`` in float32; the same shape and dtype."""
    half = cosines.shape[-1]
    first, second, rest = heads.split((half, half, heads.shape[-1] - 2 * half), dim=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return torch.cat([*(part.to(heads.dtype) for part in turned), rest], dim=-1)
