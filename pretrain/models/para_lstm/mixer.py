"""The ParaLSTM mixer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels.newton_rnn import NewtonReport, newton_lstm, newton_rnn
from kernels.newton_rnn.lstm import LSTMCell
from pretrain.models.mixer import State
from pretrain.models.newton_block import NewtonBlock
from pretrain.models.state_figures import values_before


class ParaLSTM(NewtonBlock):
    """LSTM with diagonal recurrent weights and peepholes (Danieli et al. 2025, arXiv 2510.21450).

    The input gate is what the forget gate leaves. Per channel, with ``A`` the parameter ``recurrent``, ``C``
    the parameter ``peephole`` (on the old cell for ``f``, on the new one for ``o``)::

        f_t = sigmoid(A_f h_{t-1} + C_f c_{t-1} + p_f)   c_t = f_t c_{t-1} + (1 - f_t) tanh(A_c h_{t-1} + p_c)
        o_t = sigmoid(A_o h_{t-1} + C_o c_t + p_o)       h_t = o_t tanh(c_t)

    The higher the bias of ``f``, the longer a channel remembers. The authors' code starts it at -1 to 0, as it
    does ParaGRU's ``z``, which would make an LSTM forget; here it starts at 0 to 1.
    """

    peepholes = 2
    state_names = ("cell", "hidden")
    keeping_sign = 1

    def solve(
        self, gates: Tensor, state: State | None, starts: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], NewtonReport]:
        initial = None if state is None else torch.stack([state["cell"], state["hidden"]], dim=1)
        hidden, final, report = newton_lstm(
            gates, self.recurrent, self.peephole, initial_state=initial, document_starts=starts, **options
        )
        cell, last = final.unbind(1)
        return hidden, {"cell": cell, "hidden": last}, report

    def add_gates(self, gates: Tensor, hidden: Tensor, state: State | None, starts: Tensor | None) -> None:
        # The cell of each token, which the gates see, is solved for again: layers keep the hidden state alone.
        initial = None if state is None else torch.stack([state["cell"], state["hidden"]], dim=1)
        states, _, _ = newton_rnn(
            LSTMCell(), gates, (self.recurrent, self.peephole), initial_state=initial, document_starts=starts
        )
        old_cell, old_hidden = values_before(states, initial, starts).unbind(2)
        forget, output, _ = gates.unbind(2)
        forget = forget + self.recurrent[0] * old_hidden + self.peephole[0] * old_cell
        output = output + self.recurrent[1] * old_hidden + self.peephole[1] * states[:, :, 0]
        self.figures.gate("forget_gate", torch.sigmoid(forget))
        self.figures.gate("output_gate", torch.sigmoid(output))


MIXER = ParaLSTM
