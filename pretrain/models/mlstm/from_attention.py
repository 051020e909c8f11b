"""The mLSTM in the place of attention: queries, keys, values and output are attention's.

Each query head becomes a head, with keys and values that heads share repeated. Gates start as constants: input gates at
1, output gates half open, and forget gates so that each head forgets at its own rate. The cell divides by the sum of
its scores, as softmax does, where that is above 1; the norm of each head starts with the scale of the values, doubled
for the output gate's half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import InputError
from pretrain.models.attention.config import AttentionConfig
from pretrain.models.attention.linear_maps import MEMORY_OF_HEADS, linear_maps
from pretrain.models.mlstm.config import MLSTMConfig


def section(attention: AttentionConfig, hidden_size: int) -> dict[str, Any]:
    """See ``MixerFamily.from_attention``."""
    if attention.bias or attention.has_output_bias:
        raise InputError("mlstm has no biases of queries, keys, values or output, as this attention has; take mamba2")
    width = attention.num_heads * attention.size_of_head(hidden_size)
    factor = width / hidden_size
    if int(hidden_size * factor) != width:
        # The quotient came out a little below, and would be cut off.
        factor = (width + 0.5) / hidden_size
    # A forget gate of f keeps sigmoid(f) of the memory.
    forget = [math.log(tokens - 1.0) for tokens in MEMORY_OF_HEADS]
    return {
        "type": "mlstm",
        "num_heads": attention.num_heads,
        "query_key_factor": factor,
        "value_factor": factor,
        "input_gate_bias": 0.0,
        "forget_gate_bias": forget,
    }


def weights(
    attention: AttentionConfig, config: MLSTMConfig, hidden_size: int, source: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """See ``MixerFamily.from_attention``."""
    maps = linear_maps(attention, hidden_size, source)
    heads, width = config.num_heads, config.value_size(hidden_size)
    # The cell scales queries by itself.
    own_scale = (config.query_key_size(hidden_size) // heads) ** -0.5
    cap = config.gate_soft_cap
    forget = torch.linspace(*config.forget_gate_bias, heads)
    return {
        "projections.query_weight": maps.query / own_scale,
        "projections.key_weight": maps.key,
        "projections.value_weight": maps.value,
        "projections.output_gate_weight": torch.zeros(width, hidden_size),
        "projections.input_gate_weight": torch.zeros(heads, hidden_size),
        "projections.forget_gate_weight": torch.zeros(heads, hidden_size),
        "input_gate_bias": torch.full((heads,), config.input_gate_bias),
        # Gates are capped by c tanh(x / c).
        "forget_gate_bias": cap * torch.atanh(forget / cap),
        "norm_weight": 2.0 * maps.value_scale,
        "output.weight": maps.output,
    }
