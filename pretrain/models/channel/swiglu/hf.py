"""SwiGLU in Hugging Face's form: native names and fields by ``model_type``, settings of ``modeling.py``."""

from __future__ import annotations

from pretrain.errors import InputError
from pretrain.models.channel.swiglu.config import SwiGLUConfig
from pretrain.models.hugging_face import Piece, renamed_section

# The classes of Llama's layout.
_DENSE = ("llama", "mistral", "qwen2", "qwen3")
_DENSE_NAMES = {
    "projections.gate_weight": "mlp.gate_proj.weight",
    "projections.up_weight": "mlp.up_proj.weight",
    "down.weight": "mlp.down_proj.weight",
}

# Our name within the mixer -> the name within a block of the native class.
KEYS = {
    "xlstm": {
        "projections.gate_weight": "ffn.proj_up_gate.weight",
        "projections.up_weight": "ffn.proj_up.weight",
        "down.weight": "ffn.proj_down.weight",
    },
    "bamba": {
        "projections.gate_weight": "feed_forward.gate_proj.weight",
        "projections.up_weight": "feed_forward.up_proj.weight",
        "down.weight": "feed_forward.down_proj.weight",
    },
    "granitemoehybrid": {
        "projections.gate_weight": Piece("shared_mlp.input_linear.weight", 0),
        "projections.up_weight": Piece("shared_mlp.input_linear.weight", 1),
        "down.weight": "shared_mlp.output_linear.weight",
    },
    **dict.fromkeys(_DENSE, _DENSE_NAMES),
}
OUTPUTS = ("down.weight",)


def xlstm_inner_size(hidden_size: int, factor: float, multiple: int) -> int:
    """Inner width that ``xLSTMConfig`` derives from ``ffn_proj_factor`` and ``ffn_round_up_to_multiple_of``."""
    return int((hidden_size * factor + multiple - 1) // multiple * multiple)


def _xlstm_fields(config: SwiGLUConfig, hidden_size: int) -> dict[str, object]:
    """``xLSTMConfig``'s fields.

    Raises:
        InputError: its formula reaches the inner width neither with the configured factor and multiple nor
            with the exact ratio and no rounding.
    """
    inner = config.inner_size(hidden_size)
    candidates = [
        (config.projection_factor, config.round_up_to),
        (inner / hidden_size, 1),
        # The ratio may come out a little below the whole number that the formula then cuts off.
        ((inner + 0.5) / hidden_size, 1),
    ]
    for factor, multiple in candidates:
        if xlstm_inner_size(hidden_size, factor, multiple) == inner:
            return {"ffn_proj_factor": factor, "ffn_round_up_to_multiple_of": multiple}
    raise InputError(
        f"the swiglu's inner width {inner} at hidden_size={hidden_size} cannot be written as xLSTMConfig's "
        f"ffn_proj_factor and ffn_round_up_to_multiple_of"
    )


def _intermediate_size(config: SwiGLUConfig, hidden_size: int) -> dict[str, object]:
    return {"intermediate_size": config.inner_size(hidden_size)}


def _granite_fields(config: SwiGLUConfig, hidden_size: int) -> dict[str, object]:
    inner = config.inner_size(hidden_size)
    # The second is of experts, of which there are none.
    fields = {"shared_intermediate_size": inner, "intermediate_size": inner}
    return fields | {"num_local_experts": 0, "num_experts_per_tok": 0}


FIELDS = {
    "xlstm": _xlstm_fields,
    "granitemoehybrid": _granite_fields,
    **dict.fromkeys(("bamba", *_DENSE), _intermediate_size),
}
_XLSTM_NAMES = {"projection_factor": "ffn_proj_factor", "round_up_to": "ffn_round_up_to_multiple_of"}
SECTIONS = {
    "xlstm": renamed_section("swiglu", _XLSTM_NAMES),
    "granitemoehybrid": renamed_section("swiglu", {"intermediate_size": "shared_intermediate_size"}),
    **dict.fromkeys(("bamba", *_DENSE), renamed_section("swiglu", {"intermediate_size": "intermediate_size"})),
}


def settings(config: SwiGLUConfig, hidden_size: int) -> dict[str, object]:
    return {"inner_size": config.inner_size(hidden_size)}
