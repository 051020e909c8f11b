"""What a linear recurrence's segment adds to a state: a weighted sum of outer products, one matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def weighted_outer_sum(weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``sum_t weights_t left_t right_t^T`` per head.

    Keeps its arguments and no copies, so that what a recurrence keeps anyway is kept once.

    Args:
        weights: (batch, sequence, heads), float32 or float64, the dtype of the arithmetic.
        left: (batch, sequence, heads, rows), any floating dtype and strides.
        right: (batch, sequence, groups, columns); head h takes group ``h * groups // heads``.

    Returns:
        (batch, heads, rows, columns) in the dtype of ``weights``.
    """
    return _WeightedOuterSum.apply(weights, left, right)


class _WeightedOuterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(weights, left, right)
        sums = _by_group(left * weights[..., None], right.shape[2]).mT @ _by_group(right.to(weights.dtype))
        return sums.unflatten(2, (-1, left.shape[3])).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, left, right = ctx.saved_tensors
        groups = right.shape[2]
        gradient = gradient.unflatten(1, (groups, -1)).flatten(2, 3)
        of_rows = (_by_group(right.to(weights.dtype)) @ gradient.mT).transpose(1, 2).unflatten(3, (-1, left.shape[3]))
        of_rows = of_rows.flatten(2, 3)
        of_columns = _by_group(left * weights[..., None], groups) @ gradient
        return (
            (of_rows * left).sum(-1),
            (of_rows * weights[..., None]).to(left.dtype),
            of_columns.transpose(1, 2).to(right.dtype),
        )


def _by_group(tensor: Tensor, groups: int | None = None) -> Tensor:
    """(batch, sequence, heads, size) to (batch, groups, sequence, heads / groups * size)."""
    if groups is not None:
        tensor = tensor.unflatten(2, (groups, -1)).flatten(3, 4)
    return tensor.transpose(1, 2)
