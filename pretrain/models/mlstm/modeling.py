"""mLSTM (xLSTM-7B layout) in torch alone, for exported models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.modeling import Projections, State, empty_parameter, head_layer_norm


def mlstm_cell(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    state: State | None,
    chunk_size: int,
    epsilon: float,
) -> tuple[Tensor, State]:
    """The stabilised mLSTM cell, quadratic within chunks (Beck et al. 2024, arXiv 2405.04517, section 2.3).

    Args:
        query, key, value: ``(batch, sequence, heads, size)``.
        input_gate, forget_gate: pre-activations ``(batch, sequence, heads)``, float32.
        state: ``matrix`` (batch, heads, key size, value size), ``normalizer`` (batch, heads, key size) and
            ``stabilizer`` (batch, heads), float32; None: zeros.
        chunk_size: tokens read at once.
        epsilon: added to the denominator.

    Returns:
        ``(batch, sequence, heads, value size)`` float32, and the state after the last token.
    """
    query, key, value = (tensor.float().transpose(1, 2) for tensor in (query, key, value))
    query = query * query.shape[-1] ** -0.5
    input_gate, log_forget = input_gate.transpose(1, 2), nn.functional.logsigmoid(forget_gate).transpose(1, 2)
    if state is None:
        matrix = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
        normalizer, stabilizer = matrix[..., 0], matrix[..., 0, 0]
    else:
        matrix, normalizer, stabilizer = state["matrix"], state["normalizer"], state["stabilizer"]

    outputs = []
    chunks = (tensor.split(chunk_size, 2) for tensor in (query, key, value, input_gate, log_forget))
    for q, k, v, gate, log_decay in zip(*chunks, strict=True):
        decay = log_decay.cumsum(-1)
        # Exponents of what token t reads of token s, and of the state before the chunk.
        pairs = decay[..., :, None] - decay[..., None, :] + gate[..., None, :]
        later = torch.ones(pairs.shape[-2:], dtype=torch.bool, device=pairs.device).triu(1)
        pairs = pairs.masked_fill(later, -torch.inf)
        carried = decay + stabilizer[..., None]
        stabilizers = torch.maximum(carried, pairs.amax(-1))
        scores = q @ k.mT * torch.exp(pairs - stabilizers[..., None])
        carry = torch.exp(carried - stabilizers)
        numerator = scores @ v + carry[..., None] * (q @ matrix)
        read = scores.sum(-1) + carry * (q @ normalizer[..., None])[..., 0]
        denominator = torch.maximum(read.abs(), torch.exp(-stabilizers)) + epsilon
        outputs.append(numerator / denominator[..., None])

        stabilizer = stabilizers[..., -1]
        written = k * torch.exp(pairs[..., -1, :] - stabilizer[..., None])[..., None]
        matrix = carry[..., -1, None, None] * matrix + written.mT @ v
        normalizer = carry[..., -1, None] * normalizer + written.sum(-2)
    final = {"matrix": matrix, "normalizer": normalizer, "stabilizer": stabilizer}
    return torch.cat(outputs, 2).transpose(1, 2), final


class MLSTM(nn.Module):
    """``output(sigmoid(o) * layer_norm_per_head(cell))`` (xLSTM-7B, arXiv 2503.13427, section 3)."""

    float32_parameters = ("input_gate_bias", "forget_gate_bias", "norm_weight")

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        query_key_size: int,
        value_size: int,
        gate_soft_cap: float,
        norm_epsilon: float,
        cell_epsilon: float,
        chunk_size: int,
    ):
        super().__init__()
        self.num_heads, self.chunk_size, self.gate_soft_cap = num_heads, chunk_size, gate_soft_cap
        self.norm_epsilon, self.cell_epsilon = norm_epsilon, cell_epsilon
        sizes = {
            "query": query_key_size,
            "key": query_key_size,
            "value": value_size,
            "output_gate": value_size,
            "input_gate": num_heads,
            "forget_gate": num_heads,
        }
        self.projections = Projections(hidden_size, sizes)
        self.input_gate_bias = empty_parameter(num_heads)
        self.forget_gate_bias = empty_parameter(num_heads)
        self.norm_weight = empty_parameter(value_size)
        self.output = nn.Linear(value_size, hidden_size, bias=False)

    def _gate(self, preactivation: Tensor, bias: Tensor) -> Tensor:
        return self.gate_soft_cap * torch.tanh((preactivation.float() + bias.float()) / self.gate_soft_cap)

    def forward(self, hidden: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Maps ``(batch, sequence, hidden_size)`` to the same shape, from one state to the next."""
        query, key, value, output_gate, input_gate, forget_gate = self.projections(hidden)
        cell, state = mlstm_cell(
            *(tensor.unflatten(-1, (self.num_heads, -1)) for tensor in (query, key, value)),
            self._gate(input_gate, self.input_gate_bias),
            self._gate(forget_gate, self.forget_gate_bias),
            state,
            self.chunk_size,
            self.cell_epsilon,
        )
        normed = head_layer_norm(cell, self.norm_weight, self.norm_epsilon)
        return self.output((torch.sigmoid(output_gate.float()) * normed).to(hidden.dtype)), state


MODELING = MLSTM
