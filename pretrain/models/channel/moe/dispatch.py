"""Tokens to the ranks and places of their experts, and back.

Expert parallelism splits the experts of a layer over data-parallel ranks (Megatron-core's expert-parallel group). Each
rank sends every token to the ranks that hold its experts, and gets the results back: two all-to-all exchanges forward,
and the same two backward. How many rows go where differs from call to call, so no token is ever dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


class _RowsInOrder(torch.autograd.Function):
    """Rows of each token, once for each of its experts, in another order; backward adds up in one order, always."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, each: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.each = each
        return rows.index_select(0, order // each)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        back = gradient.index_select(0, inverse(order))
        return (back if ctx.each == 1 else back.unflatten(0, (-1, ctx.each)).sum(dim=1)), None, None


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``."""
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    return places


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks of the expert-parallel group, and theirs to this one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        result = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(
            result, rows.contiguous(), received, sent, group=parallel_state.get_expert_model_parallel_group()
        )
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _AllToAll.forward(ctx, gradient, ctx.received, ctx.sent), None, None


def through_experts(
    tokens: Tensor, experts: Tensor, num_experts: int, compute: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, int]:
    """Sends each token to its experts, wherever they are, and gathers what they return.

    Args:
        tokens: ``(tokens, hidden_size)``.
        experts: ``(tokens, experts_per_token)`` int64.
        num_experts: of the layer, all ranks together.
        compute: what this rank's experts do: rows sorted by expert and how many each of its experts has,
            ``(experts of this rank,)`` int64, to as many rows.

    Returns:
        ``(tokens, experts_per_token, hidden_size)``, and how many rows this rank's experts worked on.
    """
    each = experts.shape[1]
    # Stable, so that rows of one expert keep the order of their tokens, and sums their rounding.
    order = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten(), minlength=num_experts)
    rows = _RowsInOrder.apply(tokens, order, each)
    ranks = parallel_state.get_expert_model_parallel_world_size()
    worked = rows.shape[0]
    if ranks == 1:
        rows = compute(rows, counts)
    else:
        # Of the experts here, how many rows each rank sends: (ranks, experts of this rank).
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=parallel_state.get_expert_model_parallel_group())
        arriving = arriving.view(ranks, -1)
        splits = torch.stack([counts.view(ranks, -1).sum(dim=1), arriving.sum(dim=1)])
        sent, received = splits.tolist()
        worked = sum(received)
        rows = _AllToAll.apply(rows, sent, received)
        # They come sorted by rank, then expert.
        owners = torch.arange(arriving.shape[1], device=rows.device).repeat(ranks)
        by_expert = owners.repeat_interleave(arriving.flatten(), output_size=worked).argsort(stable=True)
        rows = compute(_RowsInOrder.apply(rows, by_expert, 1), arriving.sum(dim=0))
        rows = _AllToAll.apply(_RowsInOrder.apply(rows, inverse(by_expert), 1), received, sent)
    return _RowsInOrder.apply(rows, inverse(order), 1).unflatten(0, (-1, each)), worked
