"""Attention in Hugging Face's form: native names and fields by ``model_type``, settings of ``modeling.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.errors import InputError
from pretrain.models.attention.config import AttentionConfig
from pretrain.models.hugging_face import renamed_section


def _names(layer: str, bias: bool, output_bias: bool | None = None, norms: bool = False) -> dict[str, str]:
    """Our names -> those in a class whose block calls this layer ``layer``.

    Args:
        bias: whether the class can have biases of queries, keys and values.
        output_bias: of the output; None: as ``bias``.
        norms: whether it has norms of queries and keys.
    """
    theirs = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    names = {f"projections.{name}_weight": f"{layer}.{their}.weight" for name, their in theirs.items()}
    names["output.weight"] = f"{layer}.o_proj.weight"
    if bias:
        names |= {f"{name}_bias": f"{layer}.{their}.bias" for name, their in theirs.items()}
    if bias if output_bias is None else output_bias:
        names["output_bias"] = f"{layer}.o_proj.bias"
    if norms:
        names |= {f"{name}_norm_weight": f"{layer}.{name[0]}_norm.weight" for name in ("query", "key")}
    return names


KEYS = {
    "nemotron_h": _names("mixer", bias=False),
    "bamba": _names("self_attn", bias=True),
    "granitemoehybrid": _names("self_attn", bias=True),
    "llama": _names("self_attn", bias=True),
    "mistral": _names("self_attn", bias=False),
    "qwen2": _names("self_attn", bias=True, output_bias=False),
    "qwen3": _names("self_attn", bias=True, norms=True),
}
OUTPUTS = ("output.weight", "output_bias")
LAYER_TYPES = dict.fromkeys(("nemotron_h", "bamba", "granitemoehybrid"), "full_attention")

# Our keys -> fields that all classes have, and all but some.
_HEAD_FIELDS = {"num_heads": "num_attention_heads", "num_key_value_heads": "num_key_value_heads"}
_FIELD_NAMES = _HEAD_FIELDS | {"head_size": "head_dim", "bias": "attention_bias"}


_NO_NORMS = "has no norm of queries and keys"


def _scale(config: AttentionConfig, hidden_size: int) -> float:
    return config.size_of_head(hidden_size) ** -0.5 if config.softmax_scale is None else config.softmax_scale


def _common_fields(
    config: AttentionConfig, hidden_size: int, *, windows: bool = False, norms: bool = False
) -> dict[str, object]:
    """Fields that most classes have.

    Args:
        windows: whether the class can have a sliding window.
        norms: whether it has norms of queries and keys.

    Raises:
        InputError: it has no such attention.
    """
    if config.sliding_window is not None and not windows:
        raise InputError("has no attention with a sliding window")
    if config.query_key_norm != norms:
        raise InputError("has no attention without a norm of queries and keys" if norms else _NO_NORMS)
    if config.has_output_bias != config.bias:
        raise InputError("has biases of all four projections of attention or of none")
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


# Our keys of scaled wavelengths -> those of the classes.
_SCALING = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}


def _rope(config: AttentionConfig) -> dict[str, object]:
    if config.rotary_scaling is not None:
        raise InputError("has no scaled rotary positions")
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


def _rotated_whole(config: AttentionConfig, hidden_size: int) -> dict[str, object]:
    """Fields of rotary positions of a class that rotates all of each head and scales scores by its size."""
    _check_scale(config, hidden_size)
    if config.rotary_size(hidden_size) != config.size_of_head(hidden_size):
        raise InputError("has no attention but with rotary positions in all of each head")
    scaling = config.rotary_scaling
    if scaling is None:
        return {"rope_parameters": _rope(config)}
    scaled = {theirs: getattr(scaling, ours) for ours, theirs in _SCALING.items()}
    return {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": config.rotary_base, **scaled},
        # Of no effect, but the class asks for more than the original context.
        "max_position_embeddings": int(scaling.factor * scaling.original_context),
    }


def _llama_fields(config: AttentionConfig, hidden_size: int) -> dict[str, object]:
    if hidden_size % config.num_heads:
        raise InputError(f"has no {config.num_heads} heads, which do not divide hidden_size={hidden_size}")
    return _rotated_whole(config, hidden_size) | _common_fields(config, hidden_size)


def _mistral_fields(config: AttentionConfig, hidden_size: int) -> dict[str, object]:
    fields = _rotated_whole(config, hidden_size) | _common_fields(config, hidden_size, windows=True)
    if fields.pop("attention_bias"):
        raise InputError("has no biases in attention")
    return fields | {"sliding_window": config.sliding_window}


def _qwen2_fields(config: AttentionConfig, hidden_size: int) -> dict[str, object]:
    if not config.bias or config.has_output_bias:
        raise InputError("has no attention but with biases of queries, keys and values and none of the output")
    if config.size_of_head(hidden_size) * config.num_heads != hidden_size:
        raise InputError(f"has no head_size={config.head_size}, but hidden_size / num_heads")
    fields = _rotated_whole(config, hidden_size) | _common_fields(
        config.model_copy(update={"output_bias": True}), hidden_size
    )
    heads = {name: fields[name] for name in _HEAD_FIELDS.values()}
    kept = {name: fields[name] for name in ("rope_parameters", "max_position_embeddings") if name in fields}
    return heads | kept | {"use_sliding_window": False}


def _qwen3_fields(config: AttentionConfig, hidden_size: int) -> dict[str, object]:
    fields = _rotated_whole(config, hidden_size) | _common_fields(config, hidden_size, norms=True)
    return fields | {"rms_norm_eps": config.norm_epsilon, "use_sliding_window": False}


FIELDS = {
    "nemotron_h": _nemotron_fields,
    "bamba": _bamba_fields,
    "granitemoehybrid": _granite_fields,
    "llama": _llama_fields,
    "mistral": _mistral_fields,
    "qwen2": _qwen2_fields,
    "qwen3": _qwen3_fields,
}

_common_section = renamed_section("attention", _FIELD_NAMES)
_heads_section = renamed_section("attention", _HEAD_FIELDS, bias=True, output_bias=False)


def _rotation(fields: Mapping[str, Any]) -> dict[str, Any]:
    rope = fields["rope_parameters"]
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise InputError(f"rope_parameters is {rope!r}, where rope_theta is expected")
    section = {"rotary_base": rope["rope_theta"], "rotary_fraction": rope.get("partial_rotary_factor", 1.0)}
    if rope.get("rope_type") == "llama3":
        missing = [theirs for theirs in _SCALING.values() if theirs not in rope]
        if missing:
            raise InputError(f"rope_parameters is {rope!r}, where {', '.join(missing)} is expected too")
        section["rotary_scaling"] = {ours: rope[theirs] for ours, theirs in _SCALING.items()}
    return section


def _rotary_section(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _common_section(fields) | _rotation(fields)


def _mistral_section(fields: Mapping[str, Any]) -> dict[str, Any]:
    window = {"sliding_window": fields["sliding_window"]}
    return _rotary_section({**fields, "attention_bias": False}) | window


def _qwen2_section(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _heads_section(fields) | _rotation(fields)


def _qwen3_section(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _rotary_section(fields) | {"query_key_norm": True, "norm_epsilon": fields["rms_norm_eps"]}


def _granite_section(fields: Mapping[str, Any]) -> dict[str, Any]:
    rotates = fields["position_embedding_type"] == "rope"
    section = _rotary_section(fields) if rotates else _common_section(fields) | {"rotary_fraction": 0.0}
    return section | {"softmax_scale": fields["attention_multiplier"]}


SECTIONS = {
    "nemotron_h": renamed_section("attention", _FIELD_NAMES, rotary_fraction=0.0),
    "bamba": _rotary_section,
    "granitemoehybrid": _granite_section,
    "llama": _rotary_section,
    "mistral": _mistral_section,
    "qwen2": _qwen2_section,
    "qwen3": _qwen3_section,
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
        "output_bias": config.has_output_bias,
        "rotary_scaling": None if config.rotary_scaling is None else config.rotary_scaling.model_dump(),
    }
