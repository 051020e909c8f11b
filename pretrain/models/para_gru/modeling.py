"""ParaGRU in torch alone, for exported models, and the block that it shares with ParaLSTM.

Training solves the recurrence over the whole sequence at once; here it runs token by token, which gives the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.modeling import GroupedRMSNorm, Projections, State, causal_convolution, empty_parameter

GATES = 3


class ElementwiseRecurrentBlock(nn.Module):
    """``output(rms_norm(cell(blockdiagonal(silu(convolution(u))) + bias)) * silu(z))`` (arXiv 2510.21450).

    ``u`` and ``z`` are two projections of the input. A subclass says what the cell does, channel by channel.
    """

    float32_parameters: tuple[str, ...] = ("convolution_weight", "convolution_bias", "recurrent")

    def __init__(
        self,
        hidden_size: int,
        *,
        inner_size: int,
        num_heads: int,
        convolution_width: int,
        norm_groups: int,
        norm_epsilon: float,
    ):
        super().__init__()
        head_size = inner_size // num_heads
        self.projections = Projections(hidden_size, {"input": inner_size, "output_gate": inner_size})
        self.convolution_weight = empty_parameter(inner_size, convolution_width)
        self.convolution_bias = empty_parameter(inner_size)
        self.input_map = empty_parameter(num_heads, head_size, GATES, head_size)
        self.bias = empty_parameter(GATES, inner_size)
        self.recurrent = empty_parameter(GATES, inner_size)
        self.norm = GroupedRMSNorm(inner_size, norm_groups, norm_epsilon)
        self.output = nn.Linear(inner_size, hidden_size, bias=False)

    def cell(self, gates: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The recurrence.

        Args:
            gates: inputs' part of the pre-activations, ``(batch, sequence, 3, channels)`` float32.
            state: of the whole block; None: zeros.

        Returns:
            ``(batch, sequence, channels)``, and the cell's state after the last token; float32.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what its cell does")

    def forward(self, hidden: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Maps ``(batch, sequence, hidden_size)`` to the same shape, from one state to the next."""
        inputs, output_gate = self.projections(hidden)
        convolved, window = causal_convolution(
            inputs, self.convolution_weight, self.convolution_bias, None if state is None else state["convolution"]
        )
        channels = nn.functional.silu(convolved).to(hidden.dtype).unflatten(-1, self.input_map.shape[:2])
        gates = torch.einsum("bshi,higo->bsgho", channels, self.input_map).flatten(-2) + self.bias
        recurrent, final = self.cell(gates.float(), state)
        gated = self.norm(recurrent) * nn.functional.silu(output_gate.float())
        return self.output(gated.to(hidden.dtype)), final | {"convolution": window}


class ParaGRU(ElementwiseRecurrentBlock):
    """GRU whose recurrent weights are diagonal (Danieli et al. 2025, arXiv 2510.21450)."""

    def cell(self, gates: Tensor, state: State | None) -> tuple[Tensor, State]:
        hidden = torch.zeros_like(gates[:, 0, 0]) if state is None else state["hidden"]
        update_weight, reset_weight, new_weight = self.recurrent.float()
        outputs = []
        for update, reset, new in (token.unbind(1) for token in gates.unbind(1)):
            update = torch.sigmoid(update + update_weight * hidden)
            reset = torch.sigmoid(reset + reset_weight * hidden)
            new = torch.tanh(new + new_weight * hidden * reset)
            hidden = (1 - update) * hidden + update * new
            outputs.append(hidden)
        return torch.stack(outputs, 1), {"hidden": hidden}


MODELING = ParaGRU
