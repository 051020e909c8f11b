"""The ParaGRU mixer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels.newton_rnn import NewtonReport, newton_gru
from pretrain.models.mixer import State
from pretrain.models.newton_block import NewtonBlock
from pretrain.models.state_figures import values_before


class ParaGRU(NewtonBlock):
    """GRU whose recurrent weights are diagonal (Danieli et al. 2025, arXiv 2510.21450).

    Per channel, with ``A`` the parameter ``recurrent`` and ``p`` the gates' pre-activations::

        z_t = sigmoid(A_z h_{t-1} + p_z)    r_t = sigmoid(A_r h_{t-1} + p_r)
        n_t = tanh(A_n h_{t-1} r_t + p_n)   h_t = (1 - z_t) h_{t-1} + z_t n_t

    ``z`` lets the new value in, so the lower its bias, the longer a channel remembers.
    """

    state_names = ("hidden",)
    keeping_sign = -1

    def solve(
        self, gates: Tensor, state: State | None, starts: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], NewtonReport]:
        initial = None if state is None else state["hidden"]
        hidden, final, report = newton_gru(
            gates, self.recurrent, initial_state=initial, document_starts=starts, **options
        )
        return hidden, {"hidden": final}, report

    def add_gates(self, gates: Tensor, hidden: Tensor, state: State | None, starts: Tensor | None) -> None:
        before = values_before(hidden, None if state is None else state["hidden"], starts)
        for row, name in enumerate(("update_gate", "reset_gate")):
            self.figures.gate(name, torch.sigmoid(gates[:, :, row] + self.recurrent[row] * before))


MIXER = ParaGRU
