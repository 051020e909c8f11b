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
        if _has_grouped_products(rows):
            return self._at_once(rows, counts)
        outputs = []
        # An expert without rows takes part too: its gradients are zeros, which all its ranks then have alike.
        weights = zip(*(self._weights(name) for name in NAMES), strict=True)
        for part, (gate, up, down) in zip(rows.split(counts.tolist()), weights, strict=True):
            activated = nn.functional.silu(nn.functional.linear(part, gate.to(part.dtype)))
            activated = activated * nn.functional.linear(part, up.to(part.dtype))
            outputs.append(nn.functional.linear(activated, down.to(part.dtype)))
        return torch.cat(outputs)

    def _at_once(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)

        def times(inputs: Tensor, name: str) -> Tensor:
            weights = self._weights(name)
            return multiply_by_built(
                lambda weight: torch._grouped_mm(inputs, weight, offs=ends),
                lambda: torch.stack([weight.to(inputs.dtype) for weight in weights]).mT,
                self.megatron,
            )

        return times(nn.functional.silu(times(rows, "gate")) * times(rows, "up"), "down")


def _has_grouped_products(rows: Tensor) -> bool:
    # The kernel reads rows of whole 16-byte pieces.
    return rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")
