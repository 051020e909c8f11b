"""Mamba-2 in the place of attention: values, keys, queries and output are attention's (arXiv 2408.15237, section 2).

Each query head becomes a head, and a group of its own, with keys and values that heads share repeated. Everything else
starts so that the layer is nearly attention without softmax: the convolution passes on the current token alone, step
sizes are 1, the skip is 0, gates are open, and each head forgets at its own rate. What remains is the SiLU on values,
keys and queries, and the norm of each head, which starts with the scale of the values.
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
from pretrain.models.mamba2.config import Mamba2Config

# SiLU is nearly 1 there, and its slope too, so that gates can learn.
_OPEN_GATE = 1.278
_STEP_SIZE = 1.0


def section(attention: AttentionConfig, hidden_size: int) -> dict[str, Any]:
    """See ``MixerFamily.from_attention``."""
    if attention.has_output_bias:
        raise InputError("mamba2 has no bias of its output, as this attention has; leave such layers as they are")
    head_size = attention.size_of_head(hidden_size)
    return {
        "type": "mamba2",
        "num_heads": attention.num_heads,
        "head_size": head_size,
        "state_size": head_size,
        "num_groups": attention.num_heads,
        "gate_bias": _OPEN_GATE,
    }


def weights(
    attention: AttentionConfig, config: Mamba2Config, hidden_size: int, source: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """See ``MixerFamily.from_attention``."""
    maps = linear_maps(attention, hidden_size, source)
    heads, inner = attention.num_heads, config.inner_size(hidden_size)
    tap = torch.zeros(inner, config.convolution_width)
    tap[:, -1] = 1.0
    memory = torch.logspace(*(math.log2(tokens) for tokens in MEMORY_OF_HEADS), heads, base=2.0)
    found = {
        "projections.gate_weight": torch.zeros(inner, hidden_size),
        "projections.step_size_weight": torch.zeros(heads, hidden_size),
        "gate_bias": torch.full((inner,), _OPEN_GATE),
        "step_size_bias": torch.full((heads,), math.log(math.expm1(_STEP_SIZE))),
        "log_decay_rate": -torch.log(memory * _STEP_SIZE),
        "skip": torch.zeros(heads),
        "norm.weight": maps.value_scale,
        "output.weight": maps.output,
    }
    for name in ("query", "key", "value"):
        found[f"projections.{name}_weight"] = getattr(maps, name)
        found[f"{name}_convolution_weight"] = tap.clone()
        found[f"{name}_convolution_bias"] = maps.biases.get(name, torch.zeros(inner))
    return found
