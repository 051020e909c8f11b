"""Kullback-Leibler divergence of logits whose vocabulary is split over tensor-parallel ranks, exact gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def _reduce(tensor: Tensor, operation: dist.ReduceOp) -> Tensor:
    """Over tensor-parallel ranks, in place."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(tensor, operation, group=parallel_state.get_tensor_model_parallel_group())
    return tensor


def _log_probabilities(logits: Tensor) -> Tensor:
    """Of this rank's part of the vocabulary."""
    largest = _reduce(logits.amax(-1, keepdim=True), dist.ReduceOp.MAX)
    shifted = logits - largest
    return shifted - _reduce(shifted.exp().sum(-1, keepdim=True), dist.ReduceOp.SUM).log()


class _Divergence(torch.autograd.Function):
    """The gradient is worked out together with the value, and is all that is kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, reverse: bool) -> Tensor:
        own, others = (_log_probabilities(logits / temperature) for logits in (student, teacher))
        # Rows behind the vocabulary have probability 0 on both sides: no difference.
        difference = torch.where(own.isinf() & others.isinf(), 0.0, own - others)
        if reverse:
            terms = own.exp() * difference
            value = _reduce(terms.sum(-1), dist.ReduceOp.SUM)
            gradient = terms - own.exp() * value[..., None]
        else:
            value = _reduce(-(others.exp() * difference).sum(-1), dist.ReduceOp.SUM)
            gradient = own.exp() - others.exp()
        # The square keeps gradients as large as they are at temperature 1.
        ctx.save_for_backward(gradient * temperature)
        return value * temperature**2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[..., None], None, None, None


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, reverse: bool = False) -> Tensor:
    """KL(teacher || student) of each position, times ``temperature ** 2`` (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student, teacher: logits ``(..., vocabulary / tensor-parallel ranks)``; minus infinity on both sides behind the
            vocabulary. The teacher's get no gradient.
        temperature: divides the logits of both.
        reverse: KL(student || teacher) instead.

    Returns:
        ``(...)``, the same on all tensor-parallel ranks; the gradient is that of each rank's own logits.
    """
    return _Divergence.apply(student, teacher.detach(), temperature, reverse)
