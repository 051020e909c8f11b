"""Mamba-2 in Hugging Face's form: native names and fields by ``model_type``, settings of ``modeling.py``."""

from __future__ import annotations

from collections.abc import Callable

from pretrain.errors import InputError
from pretrain.models.hugging_face import ANY_TIME_STEP, Piece, renamed_section
from pretrain.models.mamba2.config import Mamba2Config


def _names(layer: str) -> dict[str, str | Piece]:
    """Our names -> those in a class whose block calls this layer ``layer``."""
    projected = ("gate", "value", "key", "query", "step_size")
    convolved = ("value", "key", "query")
    return {
        **{f"projections.{name}_weight": Piece(f"{layer}.in_proj.weight", i) for i, name in enumerate(projected)},
        **{
            f"{name}_convolution_weight": Piece(f"{layer}.conv1d.weight", i, unsqueeze=1)
            for i, name in enumerate(convolved)
        },
        **{f"{name}_convolution_bias": Piece(f"{layer}.conv1d.bias", i) for i, name in enumerate(convolved)},
        "log_decay_rate": f"{layer}.A_log",
        "step_size_bias": f"{layer}.dt_bias",
        "skip": f"{layer}.D",
        "norm.weight": f"{layer}.norm.weight",
        "output.weight": f"{layer}.out_proj.weight",
    }


KEYS = {
    "mamba2": _names("mixer"),
    "nemotron_h": _names("mixer"),
    "bamba": _names("mamba"),
    "granitemoehybrid": _names("mamba"),
}
OUTPUTS = ("output.weight",)
LAYER_TYPES = dict.fromkeys(("nemotron_h", "bamba", "granitemoehybrid"), "linear_attention")


def _expand(config: Mamba2Config, hidden_size: int) -> int:
    """The whole number that classes multiply ``hidden_size`` by.

    Raises:
        InputError: the inner width is no multiple.
    """
    inner = config.inner_size(hidden_size)
    if inner % hidden_size:
        raise InputError(f"has no inner width of {inner}, which is no multiple of hidden_size={hidden_size}")
    return inner // hidden_size


# Our keys -> fields of each class.
_FIELD_NAMES = {
    "mamba2": {
        "num_heads": "num_heads",
        "head_size": "head_dim",
        "state_size": "state_size",
        "num_groups": "n_groups",
        "convolution_width": "conv_kernel",
        "convolution_bias": "use_conv_bias",
        "chunk_size": "chunk_size",
        "norm_epsilon": "layer_norm_epsilon",
    },
    "nemotron_h": {
        "num_heads": "mamba_num_heads",
        "head_size": "mamba_head_dim",
        "state_size": "ssm_state_size",
        "num_groups": "n_groups",
        "convolution_width": "conv_kernel",
        "convolution_bias": "use_conv_bias",
        "chunk_size": "chunk_size",
        "norm_epsilon": "layer_norm_epsilon",
    },
    "bamba": {
        "num_heads": "mamba_n_heads",
        "head_size": "mamba_d_head",
        "state_size": "mamba_d_state",
        "num_groups": "mamba_n_groups",
        "convolution_width": "mamba_d_conv",
        "convolution_bias": "mamba_conv_bias",
        "chunk_size": "mamba_chunk_size",
        "norm_epsilon": "rms_norm_eps",
    },
}
_FIELD_NAMES["granitemoehybrid"] = _FIELD_NAMES["bamba"]
# Fields for the width inside, as a multiple of hidden_size.
_EXPANSIONS = {"mamba2": "expand", "bamba": "mamba_expand", "granitemoehybrid": "mamba_expand"}


def _fields(model_type: str) -> Callable[[Mamba2Config, int], dict[str, object]]:
    """The function of ``FIELDS`` for a class."""

    def fields(config: Mamba2Config, hidden_size: int) -> dict[str, object]:
        if config.gate_bias is not None:
            raise InputError("has no biases of Mamba-2's gate")
        resolved = config.model_copy(update={"num_heads": config.heads(hidden_size)})
        found = {theirs: getattr(resolved, ours) for ours, theirs in _FIELD_NAMES[model_type].items()}
        if model_type in _EXPANSIONS:
            found[_EXPANSIONS[model_type]] = _expand(config, hidden_size)
        if model_type == "nemotron_h":
            # The class raises step sizes to this one, and takes its logarithm for fresh weights.
            found["time_step_min"] = 1e-30
        return found | {"time_step_limit": ANY_TIME_STEP}

    return fields


FIELDS = {model_type: _fields(model_type) for model_type in _FIELD_NAMES}
SECTIONS = {model_type: renamed_section("mamba2", names) for model_type, names in _FIELD_NAMES.items()}


def settings(config: Mamba2Config, hidden_size: int) -> dict[str, object]:
    return {
        "num_heads": config.heads(hidden_size),
        "head_size": config.head_size,
        "state_size": config.state_size,
        "num_groups": config.num_groups,
        "convolution_width": config.convolution_width,
        "convolution_bias": config.convolution_bias,
        "gate_bias": config.gate_bias is not None,
        "norm_epsilon": config.norm_epsilon,
        "chunk_size": config.chunk_size,
    }
