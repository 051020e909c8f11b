"""Mixture of experts, its experts split over expert-parallel and tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from pretrain.models.channel.moe.config import ROUTER_STATE, MoEConfig
from pretrain.models.channel.moe.dispatch import through_experts
from pretrain.models.channel.moe.experts import Experts
from pretrain.models.channel.moe.router import (
    ROUTER_CELL,
    LinearRouter,
    RecurrentRouter,
    RouterCell,
    Routing,
    balance_loss,
    choices_per_sequence,
    route,
    z_loss,
)
from pretrain.models.channel.swiglu.config import SwiGLUConfig
from pretrain.models.channel.swiglu.mixer import SwiGLU
from pretrain.models.mixer import Carried, ChannelMixer, LayerContext
from pretrain.models.mixer_config import AUXILIARY_LOSS, SEQUENCE_LENGTHS


class MoE(ChannelMixer):
    """Each token through its likeliest experts, their outputs weighted by their probabilities.

    Routing happens where the token is, before anything is sent: under sequence parallelism each rank routes its own
    part of the sequence. Metrics are over all tokens of a step, those without a label included (chunks or words, where
    the layer stands over those):

    * ``moe_load``: rows of the busiest expert over the mean of its layer, the largest of any layer;
    * ``moe_entropy``: of the router's probabilities, in nats, mean over tokens and layers;
    * ``moe_balance_loss``, ``moe_z_loss``: means over tokens and layers, without their coefficients; a layer that
      carries nothing is not told of sequences within a row, and its figure then is of the row;
    * ``moe_dropped``: choices that no expert worked on, which is always 0.
    """

    METRICS: ClassVar[Mapping[str, str]] = {
        "moe_load": "max",
        "moe_entropy": "mean",
        "moe_balance_loss": "mean",
        "moe_z_loss": "mean",
        "moe_dropped": "sum",
    }

    def __init__(self, config: MoEConfig, context: LayerContext):
        super().__init__()
        self.config = config
        self.sequence_parallel = context.megatron.sequence_parallel
        self.is_recurrent = config.router == "recurrent"
        self.router = (RecurrentRouter if self.is_recurrent else LinearRouter)(config, context)
        self.experts = Experts(config, context)
        if config.shared_expert_size is not None:
            self.shared_expert = SwiGLU(SwiGLUConfig(intermediate_size=config.shared_expert_size), context)
        self._reset_metrics()

    @classmethod
    def shared_modules(cls, config: MoEConfig, context: LayerContext) -> dict[str, nn.Module]:
        return {ROUTER_CELL: RouterCell(config.router_size, context)} if config.router == "recurrent" else {}

    def forward(self, hidden: Tensor, carried: Carried | None = None) -> Tensor | tuple[Tensor, Carried]:
        updated = dict(carried or {})
        if self.is_recurrent:
            logits, updated[ROUTER_STATE] = self.router(hidden, updated[ROUTER_STATE], self.shared[ROUTER_CELL])
        else:
            logits = self.router(hidden)
        routing = route(logits, self.config.experts_per_token, self.sequence_parallel)
        losses = self._losses(logits, routing, updated.get(SEQUENCE_LENGTHS))
        coefficients = (self.config.balance_coefficient, self.config.z_coefficient)
        for loss, coefficient in zip(losses, coefficients, strict=True):
            if coefficient:
                updated[AUXILIARY_LOSS] = updated[AUXILIARY_LOSS] + coefficient * loss.unsqueeze(-1)
        output = self._routed(hidden, routing)
        if self.config.shared_expert_size is not None:
            share = self.config.shared_expert_share
            output = (1 - share) * output + share * self.shared_expert(hidden)
        return (output, updated) if self.config.carried(hidden.shape[-1]) else output

    def _losses(self, logits: Tensor, routing: Routing, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both losses of each token of this rank, without their coefficients.

        ``lengths``: of the sequences that stand in the only row; None: each row is one.
        """
        choices = choices_per_sequence(routing.experts, self.config.num_experts, self.sequence_parallel, lengths)
        tokens = logits.shape[0] * parallel_state.get_context_parallel_world_size()
        if self.sequence_parallel:
            tokens *= parallel_state.get_tensor_model_parallel_world_size()
        balance, z = balance_loss(routing, choices, tokens if lengths is None else lengths), z_loss(logits)
        with torch.no_grad():
            entropy = torch.special.entr(routing.probabilities).sum(dim=-1)
            sums = torch.stack([entropy.sum(), balance.sum(), z.sum(), entropy.new_tensor(float(entropy.numel()))])
            self._counted = self._counted + torch.cat([sums, choices.sum(dim=0)]).double()
        return balance, z

    def _routed(self, hidden: Tensor, routing: Routing) -> Tensor:
        experts, weights = routing.experts, routing.weights
        if self.sequence_parallel:
            # Each rank's part of every expert sees the whole sequence; gradients are summed on their way back.
            hidden = gather_from_sequence_parallel_region(hidden)
            weights = gather_from_sequence_parallel_region(weights)
            parts = experts.new_empty(hidden.shape[0], *experts.shape[1:])
            dist.all_gather_into_tensor(
                parts, experts.contiguous(), group=parallel_state.get_tensor_model_parallel_group()
            )
            experts = parts
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
            weights = copy_to_tensor_model_parallel_region(weights)
        each = self.config.experts_per_token
        rows, worked = through_experts(
            hidden.flatten(0, 1), experts.flatten(0, 1), self.config.num_experts, self.experts
        )
        self._sent_less_worked += experts.numel() - worked
        output = (rows * weights.view(-1, each, 1).to(rows.dtype)).sum(dim=1).view_as(hidden)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(output)
        return reduce_from_tensor_model_parallel_region(output)

    def _reset_metrics(self) -> None:
        self._counted: Tensor | float = 0.0
        self._sent_less_worked = 0

    def take_metrics(self) -> dict[str, float]:
        if not isinstance(self._counted, Tensor):
            return {}
        # Ranks need not have equally many tokens: there may be more chunks of one's bytes than of another's.
        dist.all_reduce(self._counted, group=parallel_state.get_data_parallel_group())
        (entropy, balance, z, tokens), choices = self._counted[:4].tolist(), self._counted[4:]
        found = {
            "moe_load": (choices.max() / choices.mean()).item(),
            "moe_entropy": entropy / tokens,
            "moe_balance_loss": balance / tokens,
            "moe_z_loss": z / tokens,
            "moe_dropped": float(self._sent_less_worked),
        }
        self._reset_metrics()
        return found


MIXER = MoE
