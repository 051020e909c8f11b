"""Mamba-2 in Hugging Face's form: native names and fields by ``model_type``, settings of ``modeling.py``."""

from __future__ import annotations

from pretrain.errors import InputError
from pretrain.models.hugging_face import ANY_TIME_STEP, Piece
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


def _mamba2_fields(config: Mamba2Config, hidden_size: int) -> dict[str, object]:
    return {
        "num_heads": config.heads(hidden_size),
        "head_dim": config.head_size,
        "expand": _expand(config, hidden_size),
        "state_size": config.state_size,
        "n_groups": config.num_groups,
        "conv_kernel": config.convolution_width,
        "use_conv_bias": config.convolution_bias,
        "chunk_size": config.chunk_size,
        "layer_norm_epsilon": config.norm_epsilon,
        "time_step_limit": ANY_TIME_STEP,
    }


def _nemotron_fields(config: Mamba2Config, hidden_size: int) -> dict[str, object]:
    return {
        "mamba_num_heads": config.heads(hidden_size),
        "mamba_head_dim": config.head_size,
        "ssm_state_size": config.state_size,
        "n_groups": config.num_groups,
        "conv_kernel": config.convolution_width,
        "use_conv_bias": config.convolution_bias,
        "chunk_size": config.chunk_size,
        "layer_norm_epsilon": config.norm_epsilon,
        "time_step_limit": ANY_TIME_STEP,
        # The class raises step sizes to this one, and takes its logarithm for fresh weights.
        "time_step_min": 1e-30,
    }


def _bamba_fields(config: Mamba2Config, hidden_size: int) -> dict[str, object]:
    """``BambaConfig``'s fields, and ``GraniteMoeHybridConfig``'s."""
    return {
        "mamba_n_heads": config.heads(hidden_size),
        "mamba_d_head": config.head_size,
        "mamba_expand": _expand(config, hidden_size),
        "mamba_d_state": config.state_size,
        "mamba_n_groups": config.num_groups,
        "mamba_d_conv": config.convolution_width,
        "mamba_conv_bias": config.convolution_bias,
        "mamba_chunk_size": config.chunk_size,
        "rms_norm_eps": config.norm_epsilon,
        "time_step_limit": ANY_TIME_STEP,
    }


FIELDS = {
    "mamba2": _mamba2_fields,
    "nemotron_h": _nemotron_fields,
    "bamba": _bamba_fields,
    "granitemoehybrid": _bamba_fields,
}


def settings(config: Mamba2Config, hidden_size: int) -> dict[str, object]:
    return {
        "num_heads": config.heads(hidden_size),
        "head_size": config.head_size,
        "state_size": config.state_size,
        "num_groups": config.num_groups,
        "convolution_width": config.convolution_width,
        "convolution_bias": config.convolution_bias,
        "norm_epsilon": config.norm_epsilon,
        "chunk_size": config.chunk_size,
    }
