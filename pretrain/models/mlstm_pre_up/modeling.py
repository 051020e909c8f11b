"""mLSTM of the first xLSTM (pre-up-projection) in torch alone, for exported models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.mlstm.modeling import mlstm_cell
from pretrain.models.modeling import Projections, State, causal_convolution, empty_parameter, head_layer_norm


def block_diagonal(hidden: Tensor, weight: Tensor) -> Tensor:
    """Maps ``(..., channels)`` to the same shape, block by block; ``weight`` is ``(blocks, size, size)``."""
    return torch.einsum("bij,...bj->...bi", weight, hidden.unflatten(-1, (-1, weight.shape[-1]))).flatten(-2)


class MLSTMPreUp(nn.Module):
    """``down((layer_norm_per_head(cell) + skip * c) * silu(z))`` with ``c = silu(convolution(x))``, ``[x, z] = up(.)``.

    Beck et al. 2024, arXiv 2405.04517, section 2.4. Queries and keys are block-diagonal maps of ``c``, values one of
    ``x``; the gates are linear maps of all queries, keys and values.
    """

    float32_parameters = (
        "input_gate_bias",
        "forget_gate_bias",
        "convolution_weight",
        "convolution_bias",
        "norm_weight",
        "skip",
    )

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        inner_size: int,
        projection_block_size: int,
        convolution_width: int,
        norm_epsilon: float,
        cell_epsilon: float,
        chunk_size: int,
    ):
        super().__init__()
        self.num_heads, self.chunk_size = num_heads, chunk_size
        self.norm_epsilon, self.cell_epsilon = norm_epsilon, cell_epsilon
        self.projections = Projections(hidden_size, {"cell": inner_size, "output_gate": inner_size})
        blocks = inner_size // projection_block_size
        for name in ("query", "key", "value"):
            weight = empty_parameter(blocks, projection_block_size, projection_block_size)
            self.register_parameter(f"{name}_weight", weight)
        for name in ("input_gate", "forget_gate"):
            self.register_parameter(f"{name}_weight", empty_parameter(num_heads, 3, inner_size))
            self.register_parameter(f"{name}_bias", empty_parameter(num_heads))
        self.convolution_weight = empty_parameter(inner_size, convolution_width)
        self.convolution_bias = empty_parameter(inner_size)
        self.norm_weight = empty_parameter(inner_size)
        self.skip = empty_parameter(inner_size)
        self.output = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Maps ``(batch, sequence, hidden_size)`` to the same shape, from one state to the next."""
        inner, output_gate = self.projections(hidden)
        convolved, window = causal_convolution(
            inner, self.convolution_weight, self.convolution_bias, None if state is None else state["window"]
        )
        convolved = nn.functional.silu(convolved).to(hidden.dtype)
        query, key = block_diagonal(convolved, self.query_weight), block_diagonal(convolved, self.key_weight)
        value = block_diagonal(inner, self.value_weight)
        together = torch.cat([query, key, value], -1)
        input_gate = nn.functional.linear(together, self.input_gate_weight.flatten(1)).float()
        forget_gate = nn.functional.linear(together, self.forget_gate_weight.flatten(1)).float()
        cell, final = mlstm_cell(
            *(tensor.unflatten(-1, (self.num_heads, -1)) for tensor in (query, key, value)),
            input_gate + self.input_gate_bias.float(),
            forget_gate + self.forget_gate_bias.float(),
            state,
            self.chunk_size,
            self.cell_epsilon,
        )
        mixed = head_layer_norm(cell, self.norm_weight, self.norm_epsilon) + self.skip.float() * convolved
        gated = (mixed * nn.functional.silu(output_gate.float())).to(hidden.dtype)
        return self.output(gated), final | {"window": window}


MODELING = MLSTMPreUp
