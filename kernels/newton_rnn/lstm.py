"""The ParaLSTM cell with its Jacobian and vector-Jacobian product written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.newton_rnn.cell import Cell, Pullback, sum_tokens


class LSTMCell(Cell):
    """An LSTM with coupled input and forget gates, peepholes and diagonal recurrent weights.

    Danieli et al. 2025, "ParaRNN", arXiv:2510.21450, section 3. With ``inputs`` (batch, tokens, 3, channels) the
    pre-activations p of f, o and the candidate g, and the parameters ``recurrent`` a (3, channels) and
    ``peephole`` w (2, channels), of f on the old and of o on the new cell::

        f = sigmoid(a_f h + w_f c + p_f)
        g = tanh(a_g h + p_g)
        c' = f c + (1 - f) g
        o = sigmoid(a_o h + w_o c' + p_o)
        h' = o tanh(c')

    The components of the state are (c, h).
    """

    components = 2

    def step(self, state: Tensor, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        _, _, cell, output, squashed = _gates(state, inputs, *parameters)
        return torch.stack((cell, output * squashed), dim=-2)

    def linearise(self, state: Tensor, inputs: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        gates = _gates(state, inputs, *parameters)
        jacobian = _jacobian(state, *parameters, *gates)
        return torch.stack((gates[2], gates[3].mul_(gates[4])), dim=-2), jacobian

    def pullback(self, state: Tensor, inputs: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Pullback]:
        recurrent, peephole = parameters
        gates = _gates(state, inputs, recurrent, peephole)
        forget, candidate, cell, output, squashed = gates
        old_cell, old_hidden = state.unbind(-2)

        def apply(cotangent: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            from_cell, from_hidden = cotangent.unbind(-2)
            gradient = torch.empty_like(inputs)
            d_forget, d_output, d_candidate = gradient.unbind(-2)
            read = from_hidden * output
            torch.mul(from_hidden, squashed, out=d_output).mul_(output).mul_(1.0 - output)
            d_cell = (from_cell + read).addcmul_(read * squashed, squashed, value=-1.0)
            d_cell.addcmul_(d_output, peephole[1])
            closed = 1.0 - forget
            slope = torch.addcmul(torch.ones_like(candidate), candidate, candidate, value=-1.0)
            torch.mul(d_cell, closed, out=d_candidate).mul_(slope)
            torch.mul(old_cell - candidate, d_cell, out=d_forget).mul_(forget).mul_(closed)
            d_peephole = torch.stack((sum_tokens(d_forget * old_cell), sum_tokens(d_output * cell)))
            return gradient, (sum_tokens(gradient * old_hidden.unsqueeze(-2)), d_peephole)

        return _jacobian(state, recurrent, peephole, *gates), apply


def _gates(state: Tensor, inputs: Tensor, recurrent: Tensor, peephole: Tensor) -> tuple[Tensor, ...]:
    """f, g, c', o and tanh(c')."""
    forget_weight, output_weight, candidate_weight = recurrent.unbind(0)
    forget_input, output_input, candidate_input = inputs.unbind(-2)
    old_cell, old_hidden = state.unbind(-2)
    forget = torch.addcmul(forget_input, old_hidden, forget_weight).addcmul_(old_cell, peephole[0]).sigmoid_()
    candidate = torch.addcmul(candidate_input, old_hidden, candidate_weight).tanh_()
    cell = torch.lerp(candidate, old_cell, forget)
    output = torch.addcmul(output_input, old_hidden, output_weight).addcmul_(cell, peephole[1]).sigmoid_()
    return forget, candidate, cell, output, cell.tanh()


def _jacobian(
    state: Tensor, recurrent: Tensor, peephole: Tensor,
    forget: Tensor, candidate: Tensor, cell: Tensor, output: Tensor, squashed: Tensor,
) -> Tensor:  # fmt: skip
    """(..., 2, 2, channels), rows c' and h', columns c and h."""
    forget_weight, output_weight, candidate_weight = recurrent.unbind(0)
    old_cell = state[..., 0, :]
    jacobian = state.new_empty(*state.shape[:-2], 2, *state.shape[-2:])
    cell_row, hidden_row = jacobian.unbind(-3)
    # dc'/dc = f + (c - g) f (1 - f) w_f ;  dc'/dh = (c - g) f (1 - f) a_f + (1 - f) (1 - g^2) a_g
    closed = 1.0 - forget
    moved = (old_cell - candidate).mul_(forget).mul_(closed)
    torch.addcmul(forget, moved, peephole[0], out=cell_row[..., 0, :])
    slope = torch.addcmul(closed, closed * candidate, candidate, value=-1.0)
    torch.mul(moved, forget_weight, out=cell_row[..., 1, :]).addcmul_(slope, candidate_weight)
    # dh'/dc' = o (1 - o) tanh(c') w_o + o (1 - tanh(c')^2), and h reaches o directly as well
    opened = torch.addcmul(output, output, output, value=-1.0).mul_(squashed)
    through_cell = torch.addcmul(output, output * squashed, squashed, value=-1.0).addcmul_(opened, peephole[1])
    torch.mul(cell_row, through_cell.unsqueeze(-2), out=hidden_row)
    hidden_row[..., 1, :].addcmul_(opened, output_weight)
    return jacobian
