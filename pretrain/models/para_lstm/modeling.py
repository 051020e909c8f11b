"""ParaLSTM in torch alone, for exported models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.models.modeling import State, empty_parameter
from pretrain.models.para_gru.modeling import ElementwiseRecurrentBlock


class ParaLSTM(ElementwiseRecurrentBlock):
    """LSTM with diagonal recurrent weights and peepholes (Danieli et al. 2025, arXiv 2510.21450)."""

    float32_parameters = (*ElementwiseRecurrentBlock.float32_parameters, "peephole")

    def __init__(self, hidden_size: int, *, inner_size: int, **settings: Any):
        super().__init__(hidden_size, inner_size=inner_size, **settings)
        self.peephole = empty_parameter(2, inner_size)

    def cell(self, gates: Tensor, state: State | None) -> tuple[Tensor, State]:
        if state is None:
            cell = hidden = torch.zeros_like(gates[:, 0, 0])
        else:
            cell, hidden = state["cell"], state["hidden"]
        forget_weight, output_weight, new_weight = self.recurrent.float()
        of_forget, of_output = self.peephole.float()
        outputs = []
        for forget, output, new in (token.unbind(1) for token in gates.unbind(1)):
            forget = torch.sigmoid(forget + forget_weight * hidden + of_forget * cell)
            new = torch.tanh(new + new_weight * hidden)
            cell = forget * cell + (1 - forget) * new
            output = torch.sigmoid(output + output_weight * hidden + of_output * cell)
            hidden = output * torch.tanh(cell)
            outputs.append(hidden)
        return torch.stack(outputs, 1), {"cell": cell, "hidden": hidden}


MODELING = ParaLSTM
