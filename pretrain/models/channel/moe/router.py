"""Routers: which experts each token goes through, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from pretrain.models.channel.moe.config import MoEConfig
from pretrain.models.mixer import LayerContext
from pretrain.models.parameters import ParameterSpec, constant, new_parameter, normal

# Name of the module that the recurrent routers of a model share.
ROUTER_CELL = "router_cell"

_STANDARD_DEVIATION = 0.02


def _weight(context: LayerContext) -> ParameterSpec:
    # Under sequence parallelism a rank routes its own part of the sequence.
    return ParameterSpec(normal(_STANDARD_DEVIATION), partial_gradient=context.megatron.sequence_parallel)


class RouterCell(nn.Module):
    """A GRU cell in PyTorch's convention (Cho et al. 2014, arXiv 1406.1078), gates in the order reset, update, new.

    With r and z the logistic functions of ``W_i x + b_i + W_h s + b_h``, and
    ``n = tanh(W_in x + b_in + r (W_hn s + b_hn))``, the new state is ``(1 - z) n + z s``.
    """

    def __init__(self, size: int, context: LayerContext):
        super().__init__()
        bias = ParameterSpec(constant(0.0), weight_decay=False, partial_gradient=context.megatron.sequence_parallel)
        self.input_weight = new_parameter((3 * size, size), _weight(context))
        self.state_weight = new_parameter((3 * size, size), _weight(context))
        self.input_bias = new_parameter((3 * size,), bias)
        self.state_bias = new_parameter((3 * size,), bias)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        """The next state of each token; all ``(..., size)`` float32."""
        size = inputs.shape[-1]
        from_inputs = nn.functional.linear(inputs, self.input_weight, self.input_bias)
        from_state = nn.functional.linear(state, self.state_weight, self.state_bias)
        reset, update = torch.sigmoid(from_inputs[..., : 2 * size] + from_state[..., : 2 * size]).chunk(2, dim=-1)
        new = torch.tanh(from_inputs[..., 2 * size :] + reset * from_state[..., 2 * size :])
        return torch.lerp(new, state, update)


class LinearRouter(nn.Module):
    """Logits are one product with the hidden states."""

    def __init__(self, config: MoEConfig, context: LayerContext):
        super().__init__()
        self.weight = new_parameter((config.num_experts, context.hidden_size), _weight(context))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., experts)`` float32."""
        return nn.functional.linear(hidden.float(), self.weight)


class RecurrentRouter(nn.Module):
    """Logits are read from a state that goes from layer to layer (RMoE, arXiv 2408.06793, section 3).

    ``x' = W_1 x``, ``s_l = GRU(x', s_{l-1})``, ``logits = W_2 s_l``; the GRU is the same in all layers. Nothing is
    detached: gradients of a layer's choice reach the routers of the layers before it through the state.
    """

    def __init__(self, config: MoEConfig, context: LayerContext):
        super().__init__()
        self.input_weight = new_parameter((config.router_size, context.hidden_size), _weight(context))
        self.output_weight = new_parameter((config.num_experts, config.router_size), _weight(context))

    def forward(self, hidden: Tensor, state: Tensor, cell: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits ``(..., experts)`` and the state ``(..., router_size)`` for the next layer, both float32."""
        state = cell(nn.functional.linear(hidden.float(), self.input_weight), state)
        return nn.functional.linear(state, self.output_weight), state


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes through.

    Attributes:
        probabilities: ``(..., experts)`` float32, of all experts.
        experts: ``(..., experts_per_token)`` int64, the likeliest.
        weights: of the same shape, float32: their probabilities, scaled to sum to 1; of a single expert the
            probability itself (arXiv 2101.03961), which the router learns from.
    """

    probabilities: Tensor
    experts: Tensor
    weights: Tensor


def route(logits: Tensor, experts_per_token: int, sequence_parallel: bool) -> Routing:
    """Chooses the likeliest experts of each token.

    Tensor-parallel ranks that hold the same tokens each work out the same choice; the first one's is taken by all,
    because a choice that differed by rounding would mix the parts of different experts.
    """
    probabilities = logits.softmax(dim=-1)
    experts = probabilities.detach().topk(experts_per_token, dim=-1).indices
    if not sequence_parallel and parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.broadcast(
            experts,
            src=parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
    chosen = probabilities.gather(-1, experts)
    weights = chosen / chosen.sum(dim=-1, keepdim=True) if experts_per_token > 1 else chosen
    return Routing(probabilities, experts, weights)


def choices_per_sequence(
    experts: Tensor, num_experts: int, sequence_parallel: bool, lengths: Tensor | None = None
) -> Tensor:
    """How many tokens of each sequence chose each expert, of the whole sequence on every rank.

    Args:
        experts: ``(sequence, batch, experts_per_token)`` int64.
        num_experts: of the layer.
        sequence_parallel: whether tensor-parallel ranks hold parts of the sequence; context-parallel ranks always do.
        lengths: ``(sequences,)`` int64, of the sequences that stand one after the other where ``batch`` is 1; None:
            each row is one.

    Returns:
        ``(batch, num_experts)``, or ``(sequences, num_experts)``, float32 whole numbers.
    """
    sequence, batch, each = experts.shape
    if lengths is not None:
        of = torch.arange(len(lengths), device=experts.device).repeat_interleave(lengths, output_size=sequence)
        places = (of[:, None] * num_experts + experts[:, 0]).flatten()
        counts = torch.zeros(len(lengths) * num_experts, device=experts.device)
        counts.scatter_add_(0, places, torch.ones(places.shape, device=experts.device))
        return counts.view(-1, num_experts)
    by_sequence = experts.transpose(0, 1).reshape(batch, sequence * each)
    counts = torch.zeros(batch, num_experts, device=experts.device)
    counts.scatter_add_(1, by_sequence, torch.ones(by_sequence.shape, device=experts.device))
    if sequence_parallel:
        dist.all_reduce(counts, group=parallel_state.get_tensor_model_parallel_group())
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(counts, group=parallel_state.get_context_parallel_group())
    return counts


def balance_loss(routing: Routing, choices: Tensor, tokens: int | Tensor) -> Tensor:
    """Load-balancing loss of each token, whose mean over a sequence is ``E sum_e f_e P_e``.

    f_e is the share of the sequence's tokens that chose expert e (all shares sum to ``experts_per_token``) and P_e the
    mean probability of e over them (Fedus et al. 2021, arXiv 2101.03961, equation 4, over a sequence for a batch, so
    that it does not depend on how sequences fall on micro-batches and ranks). Even loads give ``experts_per_token``.

    Args:
        routing: of ``(sequence, batch)`` tokens, this rank's part of the sequence.
        choices: ``(batch, experts)``, see :func:`choices_per_sequence`.
        tokens: of a whole sequence; of each that stands in the only row, ``(sequences,)`` int64, and ``choices`` is of
            those.

    Returns:
        ``(sequence, batch)`` float32; the shares pass no gradient on.
    """
    if isinstance(tokens, Tensor):
        positions = routing.probabilities.shape[0]
        shares = (choices / tokens[:, None]).repeat_interleave(tokens, dim=0, output_size=positions)[:, None]
    else:
        shares = choices / tokens
    return choices.shape[-1] * (routing.probabilities * shares).sum(dim=-1)


def z_loss(logits: Tensor) -> Tensor:
    """Squared log-partition of each token (Zoph et al. 2022, arXiv 2202.08906, equation 5): ``(...)`` float32."""
    return logits.logsumexp(dim=-1).square()
