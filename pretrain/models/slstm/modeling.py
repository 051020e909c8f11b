"""sLSTM in torch alone, for exported models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.modeling import State, causal_convolution, empty_parameter, head_layer_norm

# The first two see the convolved input, the others the input itself.
GATES = ("input_gate", "forget_gate", "cell_input", "output_gate")
CELL_STATE = ("hidden", "cell", "normalizer", "stabilizer")


def slstm_cell(gates: Tensor, recurrent: Tensor, bias: Tensor, state: State | None) -> tuple[Tensor, State]:
    """The stabilised sLSTM cell, token by token (Beck et al. 2024, arXiv 2405.04517, equations 8-17, appendix A.2).

    Args:
        gates: inputs' part of the pre-activations, ``(batch, sequence, 4, heads, size)`` in the order of ``GATES``.
        recurrent: ``(4, heads, size, size)``, multiplies the head's hidden state of the token before.
        bias: ``(4, heads, size)``.
        state: ``CELL_STATE``, each ``(batch, heads, size)`` float32; None: zeros.

    Returns:
        ``(batch, sequence, heads, size)`` float32, and the state after the last token.
    """
    gates, recurrent = gates.float() + bias.float(), recurrent.float()
    if state is None:
        hidden = cell = normalizer = stabilizer = torch.zeros_like(gates[:, 0, 0])
    else:
        hidden, cell, normalizer, stabilizer = (state[name] for name in CELL_STATE)
    outputs = []
    for token in gates.unbind(1):
        raw = token + torch.einsum("ghij,bhj->bghi", recurrent, hidden)
        input_gate, forget_gate, cell_input, output_gate = raw.unbind(1)
        # Before the first token there is nothing to decay.
        decayed = (nn.functional.logsigmoid(forget_gate) + stabilizer).masked_fill(normalizer == 0, -torch.inf)
        stabilizer = torch.maximum(decayed, input_gate)
        write, keep = torch.exp(input_gate - stabilizer), torch.exp(decayed - stabilizer)
        cell = keep * cell + write * torch.tanh(cell_input)
        normalizer = keep * normalizer + write
        hidden = torch.sigmoid(output_gate) * cell / normalizer
        outputs.append(hidden)
    final = dict(zip(CELL_STATE, (hidden, cell, normalizer, stabilizer), strict=True))
    return torch.stack(outputs, 1), final


class SLSTM(nn.Module):
    """``layer_norm_per_head(cell)``; two of the gates see a convolution of the input (arXiv 2405.04517, figure 9)."""

    float32_parameters = ("recurrent_weight", "bias", "norm_weight", "convolution_weight", "convolution_bias")

    def __init__(self, hidden_size: int, *, num_heads: int, convolution_width: int, norm_epsilon: float):
        super().__init__()
        self.convolution_width, self.norm_epsilon = convolution_width, norm_epsilon
        head_size = hidden_size // num_heads
        for name in GATES:
            self.register_parameter(f"{name}_weight", empty_parameter(num_heads, head_size, head_size))
        self.recurrent_weight = empty_parameter(len(GATES), num_heads, head_size, head_size)
        self.bias = empty_parameter(len(GATES), num_heads, head_size)
        self.norm_weight = empty_parameter(hidden_size)
        if convolution_width:
            self.convolution_weight = empty_parameter(hidden_size, convolution_width)
            self.convolution_bias = empty_parameter(hidden_size)

    def forward(self, hidden: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Maps ``(batch, sequence, hidden_size)`` to the same shape, from one state to the next."""
        convolved, window = hidden, {}
        if self.convolution_width:
            convolved, window["window"] = causal_convolution(
                hidden, self.convolution_weight, self.convolution_bias, None if state is None else state["window"]
            )
            convolved = nn.functional.silu(convolved).to(hidden.dtype)
        heads = self.bias.shape[1:]
        gates = []
        for name, inputs in zip(GATES, (convolved, convolved, hidden, hidden), strict=True):
            weight = getattr(self, f"{name}_weight")
            gates.append(torch.einsum("hij,bshj->bshi", weight, inputs.unflatten(-1, heads)))
        cell, final = slstm_cell(torch.stack(gates, 2), self.recurrent_weight, self.bias, state)
        return head_layer_norm(cell, self.norm_weight, self.norm_epsilon).to(hidden.dtype), final | window


MODELING = SLSTM
