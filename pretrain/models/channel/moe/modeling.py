"""Mixture of experts in torch alone, for exported models; its router's losses are not part of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.channel.swiglu.modeling import SwiGLU
from pretrain.models.modeling import Carried, empty_parameter

ROUTER_CELL, ROUTER_STATE = "router_cell", "router_state"


class RouterCell(nn.Module):
    """A GRU cell in PyTorch's convention (Cho et al. 2014, arXiv 1406.1078), gates in the order reset, update, new."""

    float32_parameters = ("input_weight", "state_weight", "input_bias", "state_bias")

    def __init__(self, size: int):
        super().__init__()
        self.input_weight, self.state_weight = empty_parameter(3 * size, size), empty_parameter(3 * size, size)
        self.input_bias, self.state_bias = empty_parameter(3 * size), empty_parameter(3 * size)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        """The next state; all ``(..., size)`` float32."""
        from_inputs = nn.functional.linear(inputs, self.input_weight.float(), self.input_bias.float()).chunk(3, dim=-1)
        from_state = nn.functional.linear(state, self.state_weight.float(), self.state_bias.float()).chunk(3, dim=-1)
        reset, update = (torch.sigmoid(from_inputs[gate] + from_state[gate]) for gate in (0, 1))
        new = torch.tanh(from_inputs[2] + reset * from_state[2])
        return (1 - update) * new + update * state


class LinearRouter(nn.Module):
    """Logits are one product with the hidden states."""

    float32_parameters = ("weight",)

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.weight = empty_parameter(num_experts, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(..., experts)`` float32."""
        return nn.functional.linear(hidden.float(), self.weight.float())


class RecurrentRouter(nn.Module):
    """Logits are read from a state that goes from layer to layer (RMoE, arXiv 2408.06793)."""

    float32_parameters = ("input_weight", "output_weight")

    def __init__(self, hidden_size: int, num_experts: int, size: int):
        super().__init__()
        self.input_weight, self.output_weight = empty_parameter(size, hidden_size), empty_parameter(num_experts, size)

    def forward(self, hidden: Tensor, state: Tensor, cell: nn.Module) -> tuple[Tensor, Tensor]:
        """``(..., experts)``, and the state for the next layer, both float32."""
        state = cell(nn.functional.linear(hidden.float(), self.input_weight.float()), state)
        return nn.functional.linear(state, self.output_weight.float()), state


class Experts(nn.Module):
    """``down(silu(gate(x)) * up(x))`` of each expert, ``gate_weight_0`` and so on."""

    def __init__(self, hidden_size: int, num_experts: int, inner_size: int):
        super().__init__()
        self.num_experts = num_experts
        for index in range(num_experts):
            self.register_parameter(f"gate_weight_{index}", empty_parameter(inner_size, hidden_size))
            self.register_parameter(f"up_weight_{index}", empty_parameter(inner_size, hidden_size))
            self.register_parameter(f"down_weight_{index}", empty_parameter(hidden_size, inner_size))

    def forward(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            tokens: ``(tokens, hidden_size)``.
            experts: ``(tokens, experts_per_token)`` int64.
            weights: the same shape.
        """
        output = torch.zeros_like(tokens)
        for index in range(self.num_experts):
            gate, up, down = (getattr(self, f"{name}_weight_{index}") for name in ("gate", "up", "down"))
            rows, place = (experts == index).nonzero(as_tuple=True)
            inputs = tokens[rows]
            activated = nn.functional.silu(nn.functional.linear(inputs, gate)) * nn.functional.linear(inputs, up)
            weighted = nn.functional.linear(activated, down) * weights[rows, place, None].to(tokens.dtype)
            output = output.index_add(0, rows, weighted)
        return output


class MoE(nn.Module):
    """Each token through its likeliest experts, their outputs weighted by their probabilities.

    Attributes:
        carried: what the router hands from layer to layer, name -> channels.
        shared: modules that all layers share, which belong to the model.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        experts_per_token: int,
        inner_size: int,
        shared_expert_size: int | None,
        shared_expert_share: float,
        router_size: int | None,
    ):
        super().__init__()
        self.experts_per_token, self.share = experts_per_token, shared_expert_share
        self.carried = {} if router_size is None else {ROUTER_STATE: router_size}
        if router_size is None:
            self.router = LinearRouter(hidden_size, num_experts)
        else:
            self.router = RecurrentRouter(hidden_size, num_experts, router_size)
        self.experts = Experts(hidden_size, num_experts, inner_size)
        self.shared_expert = None
        if shared_expert_size is not None:
            self.shared_expert = SwiGLU(hidden_size, inner_size=shared_expert_size)

    @staticmethod
    def shared_modules(hidden_size: int, *, router_size: int | None, **settings: object) -> dict[str, nn.Module]:
        """Modules that a model has once, by name."""
        return {} if router_size is None else {ROUTER_CELL: RouterCell(router_size)}

    def forward(self, hidden: Tensor, carried: Carried | None = None) -> Tensor | tuple[Tensor, Carried]:
        """Maps ``(..., hidden_size)`` to the same shape; where something is carried, returns it too."""
        if self.carried:
            logits, state = self.router(hidden, carried[ROUTER_STATE], self.shared[ROUTER_CELL])
            carried = {**carried, ROUTER_STATE: state}
        else:
            logits = self.router(hidden)
        weights, experts = logits.softmax(dim=-1).topk(self.experts_per_token, dim=-1)
        if self.experts_per_token > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        output = self.experts(hidden.flatten(0, -2), experts.flatten(0, -2), weights.flatten(0, -2)).view_as(hidden)
        if self.shared_expert is not None:
            output = (1 - self.share) * output + self.share * self.shared_expert(hidden)
        return (output, carried) if self.carried else output


MODELING = MoE
