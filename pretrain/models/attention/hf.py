"""Attention in Hugging Face's form: native names and fields by ``model_type``, settings of ``modeling.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.errors import InputError
from pretrain.models.attention.config import AttentionConfig
from pretrain.models.hugging_face import renamed_section


def _names(layer: str, bias: bool) -> dict[str, str]:
    """Our names -> those in a class whose block calls this layer ``layer``."""
    theirs = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    names = {f"projections.{name}_weight": f"{layer}.{their}.weight" for name, their in theirs.items()}
    names["output.weight"] = f"{layer}.o_proj.weight"
    if bias:
        names |= {f"{name}_bias": f"{layer}.{their}.bias" for name, their in theirs.items()}
        names["output_bias"] = f"{layer}.o_proj.bias"
    return names


KEYS = {
    "nemotron_h": _names("mixer", bias=False),
    "bamba": _names("self_attn", bias=True),
    "granitemoehybrid": _names("self_attn", bias=True),
}
LAYER_TYPES = dict.fromkeys(KEYS, "full_attention")

# Our keys -> fields that all classes have.
_FIELD_NAMES = {
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "bias": "attention_bias",
}


def _scale(config: AttentionConfig, hidden_size: int) -> float:
    return config.size_of_head(hidden_size) ** -0.5 if config.softmax_scale is None else config.softmax_scale


def _common_fields(config: AttentionConfig, hidden_size: int) -> dict[str, object]:
    """Fields that all classes have.

    Raises:
        InputError: none of the classes has such attention.
    """
    if config.sliding_window is not None:
        raise InputError("has no attention with a sliding window")
    if config.query_key_norm:
        raise InputError("has no norm of queries and keys")
    sizes = {"num_key_value_heads": config.key_value_heads, "head_size": config.size_of_head(hidden_size)}
    resolved = config.model_copy(update=sizes)
    return {theirs: getattr(resolved, ours) for ours, theirs in _FIELD_NAMES.items()}


def _check_scale(config: AttentionConfig, hidden_size: int) -> None:
    if _scale(config, hidden_size) != config.size_of_head(hidden_size) ** -0.5:
        raise InputError(f"has no attention with softmax_scale={config.softmax_scale}")


def _nemotron_fields(config: AttentionConfig, hidden_size: int) -> dict[str, object]:
    _check_scale(config, hidden_size)
    if config.rotary_size(hidden_size):
        raise InputError("has no rotary positions")
    if config.bias:
        raise InputError("has no biases in attention")
    return _common_fields(config, hidden_size)


def _rope(config: AttentionConfig) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": config.rotary_base}


def _bamba_fields(config: AttentionConfig, hidden_size: int) -> dict[str, object]:
    _check_scale(config, hidden_size)
    if config.rotary_size(hidden_size) != config.size_of_head(hidden_size) // 2:
        raise InputError("has no attention but with rotary positions in half of each head")
    fields = _common_fields(config, hidden_size)
    return fields | {"rope_parameters": _rope(config) | {"partial_rotary_factor": 0.5}}


def _granite_fields(config: AttentionConfig, hidden_size: int) -> dict[str, object]:
    rotary = config.rotary_size(hidden_size)
    if rotary not in (0, config.size_of_head(hidden_size)):
        raise InputError("has no rotary positions in a part of each head")
    fields = _common_fields(config, hidden_size) | {"attention_multiplier": _scale(config, hidden_size)}
    if not rotary:
        return fields | {"position_embedding_type": None}
    return fields | {"position_embedding_type": "rope", "rope_parameters": _rope(config)}


FIELDS = {"nemotron_h": _nemotron_fields, "bamba": _bamba_fields, "granitemoehybrid": _granite_fields}

_common_section = renamed_section("attention", _FIELD_NAMES)


def _rotary_section(fields: Mapping[str, Any]) -> dict[str, Any]:
    rope = fields["rope_parameters"]
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise InputError(f"rope_parameters is {rope!r}, where rope_theta is expected")
    fraction = rope.get("partial_rotary_factor", 1.0)
    return _common_section(fields) | {"rotary_base": rope["rope_theta"], "rotary_fraction": fraction}


def _granite_section(fields: Mapping[str, Any]) -> dict[str, Any]:
    rotates = fields["position_embedding_type"] == "rope"
    section = _rotary_section(fields) if rotates else _common_section(fields) | {"rotary_fraction": 0.0}
    return section | {"softmax_scale": fields["attention_multiplier"]}


SECTIONS = {
    "nemotron_h": renamed_section("attention", _FIELD_NAMES, rotary_fraction=0.0),
    "bamba": _rotary_section,
    "granitemoehybrid": _granite_section,
}


def settings(config: AttentionConfig, hidden_size: int) -> dict[str, object]:
    return {
        "num_heads": config.num_heads,
        "num_key_value_heads": config.key_value_heads,
        "head_size": config.size_of_head(hidden_size),
        "rotary_size": config.rotary_size(hidden_size),
        "rotary_base": config.rotary_base,
        "sliding_window": config.sliding_window,
        "softmax_scale": _scale(config, hidden_size),
        "query_key_norm": config.query_key_norm,
        "norm_epsilon": config.norm_epsilon,
        "bias": config.bias,
    }
