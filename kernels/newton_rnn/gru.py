"""The ParaGRU cell with its Jacobian and vector-Jacobian product written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.newton_rnn.cell import Cell, Pullback, sum_tokens


class GRUCell(Cell):
    """A GRU with diagonal recurrent weights (Danieli et al. 2025, "ParaRNN", arXiv:2510.21450, section 3).

    With ``inputs`` (batch, tokens, 3, channels) the pre-activations p of the gates z, r, n and the single
    parameter ``recurrent`` (3, channels) the weights a::

        z = sigmoid(a_z h + p_z)
        r = sigmoid(a_r h + p_r)
        n = tanh(a_n h r + p_n)
        h' = (1 - z) h + z n

    An open gate z takes the new value, the opposite of ``torch.nn.GRU``.
    """

    components = None

    def step(self, state: Tensor, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        update, _, candidate, _ = _gates(state, inputs, parameters[0])
        return torch.lerp(state, candidate, update)

    def linearise(self, state: Tensor, inputs: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        gates = _gates(state, inputs, parameters[0])
        return torch.lerp(state, gates[2], gates[0]), _jacobian(state, parameters[0], *gates)

    def pullback(self, state: Tensor, inputs: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Pullback]:
        recurrent = parameters[0]
        gates = _gates(state, inputs, recurrent)
        update, reset, candidate, weighted = gates

        def apply(cotangent: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            gradient = torch.empty_like(inputs)
            d_update, d_reset, d_candidate = gradient.unbind(-2)
            closed = 1.0 - update
            torch.mul(candidate - state, cotangent, out=d_update).mul_(update).mul_(closed)
            slope = torch.addcmul(torch.ones_like(candidate), candidate, candidate, value=-1.0)
            torch.mul(cotangent, update, out=d_candidate).mul_(slope)
            torch.mul(d_candidate, weighted, out=d_reset).mul_(reset).mul_(1.0 - reset)
            products = gradient * state.unsqueeze(-2)
            products[..., 2, :].mul_(reset)
            return gradient, (sum_tokens(products),)

        return _jacobian(state, recurrent, *gates), apply


def _gates(state: Tensor, inputs: Tensor, recurrent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, r, n and a_n h."""
    update_weight, reset_weight, candidate_weight = recurrent.unbind(0)
    update_input, reset_input, candidate_input = inputs.unbind(-2)
    update = torch.addcmul(update_input, state, update_weight).sigmoid_()
    reset = torch.addcmul(reset_input, state, reset_weight).sigmoid_()
    weighted = state * candidate_weight
    return update, reset, torch.addcmul(candidate_input, weighted, reset).tanh_(), weighted


def _jacobian(
    state: Tensor, recurrent: Tensor, update: Tensor, reset: Tensor, candidate: Tensor, weighted: Tensor
) -> Tensor:
    """dh'/dh = (1 - z) + (n - h) z (1 - z) a_z + z (1 - n^2) (a_n r + a_n h r (1 - r) a_r)."""
    update_weight, reset_weight, candidate_weight = recurrent.unbind(0)
    # a_n r (1 + h (1 - r) a_r)
    inner = torch.addcmul(state, state, reset, value=-1.0).mul_(reset_weight).add_(1.0).mul_(reset)
    inner.mul_(candidate_weight)
    slope = torch.addcmul(update, update * candidate, candidate, value=-1.0)
    # (1 - z) (1 + (n - h) z a_z)
    outer = (candidate - state).mul_(update).mul_(update_weight).add_(1.0)
    return outer.mul_(1.0 - update).addcmul_(slope, inner)
