"""Norms of the residual stream, and of channels that are split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from pretrain.models.parameters import ParameterSpec, constant, new_parameter


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, reduced in float32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float, sequence_parallel: bool):
        super().__init__()
        self.epsilon = epsilon
        spec = ParameterSpec(constant(1.0), weight_decay=False, partial_gradient=sequence_parallel)
        self.weight = new_parameter((size,), spec)

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape and dtype as ``hidden``, whose last dimension is normalised."""
        normed = nn.functional.rms_norm(hidden.float(), self.weight.shape, self.weight, self.epsilon)
        return normed.to(hidden.dtype)


class LayerNorm(RMSNorm):
    """Layer norm with a weight and no bias, reduced in float32 (Ba et al. 2016, arXiv 1607.06450)."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape and dtype as ``hidden``, whose last dimension is normalised."""
        normed = nn.functional.layer_norm(hidden.float(), self.weight.shape, self.weight, None, self.epsilon)
        return normed.to(hidden.dtype)


# By the name that ``model.norm`` gives.
NORMS: dict[str, type[RMSNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


class _SumOverTensorRanks(torch.autograd.Function):
    """All-reduce whose result every rank goes on to use for itself, so that gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverTensorRanks.forward(ctx, gradient.contiguous())


def sum_over_tensor_ranks(local: Tensor) -> Tensor:
    """Sum of every tensor-parallel rank's tensor, for use on all of them; differentiable."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return local
    return _SumOverTensorRanks.apply(local)


class GroupedRMSNorm(nn.Module):
    """RMS norm over each of several equal groups of channels, the channels split over tensor-parallel ranks.

    Groups are those of the whole tensor, however many ranks share it: a group that lies on one rank needs no
    communication, and of one that spans ranks the sums of squares are added up.
    """

    def __init__(self, size: int, groups: int, epsilon: float):
        """``size`` channels, all ranks together, in ``groups`` groups."""
        super().__init__()
        if size % groups:
            raise ValueError(f"{size} channels cannot be normalised in {groups} equal groups")
        self.group_size, self.epsilon = size // groups, epsilon
        self.groups = groups
        self.weight = new_parameter((size,), ParameterSpec(constant(1.0), shard_dimension=0, weight_decay=False))

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(..., size / ranks)`` to the same shape, float32."""
        hidden = hidden.float()
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        if self.groups % ranks == 0:
            grouped = hidden.unflatten(-1, (self.groups // ranks, self.group_size))
            return nn.functional.rms_norm(grouped, (self.group_size,), eps=self.epsilon).flatten(-2) * self.weight
        channels = hidden.shape[-1]
        first = channels * parallel_state.get_tensor_model_parallel_rank()
        group = torch.arange(first, first + channels, device=hidden.device) // self.group_size
        squares = hidden.new_zeros(*hidden.shape[:-1], self.groups).index_add(-1, group, hidden.square())
        scale = torch.rsqrt(sum_over_tensor_ranks(squares) / self.group_size + self.epsilon)
        return hidden * scale.index_select(-1, group) * self.weight
