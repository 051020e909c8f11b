"""SwiGLU experts: those of this rank, each split over tensor-parallel ranks by inner channels."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from pretrain.models.channel.moe.config import MoEConfig
from pretrain.models.linear import multiply_by_built
from pretrain.models.mixer import LayerContext
from pretrain.models.parameters import ParameterSpec, new_parameter, small_normal, wang_normal

NAMES = ("gate", "up", "down")

# Elements of bfloat16 in 16 bytes.
_ALIGNED = 8


class Experts(nn.Module):
    """``down(silu(gate(x)) * up(x))`` of each expert that this rank holds.

    Each expert's weights are parameters of their own, ``gate_weight_7`` for instance, so that their global names do not
    depend on which rank holds them. On a GPU all experts' products are one kernel call, over weights that are stacked
    and cast for it, and again for the backward pass; elsewhere they follow one another.
    """

    def __init__(self, config: MoEConfig, context: LayerContext):
        super().__init__()
        width, inner = context.hidden_size, config.intermediate_size
        self.megatron = context.megatron
        here = config.num_experts // parallel_state.get_expert_model_parallel_world_size()
        first = here * parallel_state.get_expert_model_parallel_rank()
        self.indices = range(first, first + here)
        into = ParameterSpec(small_normal(width), shard_dimension=0, expert=True)
        back = ParameterSpec(wang_normal(width, context.num_layers), shard_dimension=1, expert=True)
        for index in self.indices:
            self.register_parameter(f"gate_weight_{index}", new_parameter((inner, width), into))
            self.register_parameter(f"up_weight_{index}", new_parameter((inner, width), into))
            self.register_parameter(f"down_weight_{index}", new_parameter((width, inner), back))

    def _weights(self, name: str) -> list[nn.Parameter]:
        return [getattr(self, f"{name}_weight_{index}") for index in self.indices]

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Each row through its expert.

        Args:
            rows: ``(rows, hidden_size)``, sorted by expert.
            counts: ``(experts of this rank,)`` int64, how many rows each has.

        Returns:
            ``(rows, hidden_size)``: of several tensor-parallel ranks, this one's part of the sum.
        """
        if rows.is_cuda and self.can_work_at_once(rows.dtype):
            return self.at_once(rows, counts)
        outputs = []
        # An expert without rows takes part too: its gradients are zeros, which all its ranks then have alike.
        weights = zip(*(self._weights(name) for name in NAMES), strict=True)
        for part, (gate, up, down) in zip(rows.split(counts.tolist()), weights, strict=True):
            activated = nn.functional.silu(nn.functional.linear(part, gate.to(part.dtype)))
            activated = activated * nn.functional.linear(part, up.to(part.dtype))
            outputs.append(nn.functional.linear(activated, down.to(part.dtype)))
        return torch.cat(outputs)

    def can_work_at_once(self, dtype: torch.dtype) -> bool:
        """Whether the kernel takes these widths, which it reads in pieces of 16 bytes, and this dtype."""
        widths = self._weights("gate")[0].shape
        return (
            dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm") and all(size % _ALIGNED == 0 for size in widths)
        )

    def at_once(self, rows: Tensor, counts: Tensor) -> Tensor:
        """All experts' products in one call each; arguments as above, and ``counts`` need not be known on the host."""
        # Every expert gets zero rows behind its own until it has a multiple of what is read in one piece, and one such
        # piece at least: of an expert without rows the kernel might leave the gradient as memory was.
        padded = counts + _ALIGNED - counts % _ALIGNED
        starts, own = padded.cumsum(0) - padded, counts.cumsum(0) - counts
        expert = torch.arange(len(counts), device=rows.device).repeat_interleave(counts, output_size=len(rows))
        places = torch.arange(len(rows), device=rows.device) + (starts - own)[expert]
        total = -(-len(rows) // _ALIGNED) * _ALIGNED + _ALIGNED * len(counts)
        ends = padded.cumsum(0).to(torch.int32)
        # The last one takes what is left, so that no row belongs to none.
        ends[-1] = total
        inputs = rows.new_zeros(total, rows.shape[1]).index_copy(0, places, rows)
        activated = nn.functional.silu(self._times(inputs, "gate", ends)) * self._times(inputs, "up", ends)
        return self._times(activated, "down", ends).index_select(0, places)

    def _times(self, inputs: Tensor, name: str, ends: Tensor) -> Tensor:
        weights = self._weights(name)
        return multiply_by_built(
            lambda weight: torch._grouped_mm(inputs, weight, offs=ends),
            lambda: torch.stack([weight.to(inputs.dtype) for weight in weights]).mT,
            self.megatron,
        )
