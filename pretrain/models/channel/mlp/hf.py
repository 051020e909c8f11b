"""MLP in Hugging Face's form: native names and fields by ``model_type``, settings of ``modeling.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pretrain.errors import InputError
from pretrain.models.channel.mlp.config import MLPConfig
from pretrain.models.channel.swiglu import hf as swiglu

# Our names of activations -> those of transformers.
_ACTIVATIONS = {"relu_squared": "relu2", "gelu": "gelu", "silu": "silu"}


def _nemotron_fields(config: MLPConfig, hidden_size: int) -> dict[str, object]:
    if config.gated:
        raise InputError("has no gated feed-forward network")
    return {
        "intermediate_size": config.inner_size(hidden_size),
        "mlp_hidden_act": _ACTIVATIONS[config.activation],
        "mlp_bias": False,
    }


def _as_swiglu(fields: Callable[..., dict[str, object]]) -> Callable[[MLPConfig, int], dict[str, object]]:
    """Fields of a class that has SwiGLU, which is this mixer gated with SiLU."""

    def checked(config: MLPConfig, hidden_size: int) -> dict[str, object]:
        if not config.gated or config.activation != "silu":
            raise InputError("has no feed-forward network but SwiGLU")
        return fields(config, hidden_size)

    return checked


# Our name within the mixer -> the name within a block of the native class.
KEYS = {
    "nemotron_h": {"projections.up_weight": "mixer.up_proj.weight", "down.weight": "mixer.down_proj.weight"},
    **swiglu.KEYS,
}
FIELDS = {
    "nemotron_h": _nemotron_fields,
    **{model_type: _as_swiglu(fields) for model_type, fields in swiglu.FIELDS.items()},
}
LAYER_TYPES = {"nemotron_h": "mlp"}
OUTPUTS = swiglu.OUTPUTS


def _nemotron_section(fields: Mapping[str, Any]) -> dict[str, Any]:
    ours = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    activation = fields["mlp_hidden_act"]
    if activation not in ours:
        raise InputError(f"mlp_hidden_act is {activation!r}, where one of {', '.join(ours)} is expected")
    return {"type": "mlp", "activation": ours[activation], "intermediate_size": fields["intermediate_size"]}


SECTIONS = {"nemotron_h": _nemotron_section}


def settings(config: MLPConfig, hidden_size: int) -> dict[str, object]:
    return {"inner_size": config.inner_size(hidden_size), "activation": config.activation, "gated": config.gated}
