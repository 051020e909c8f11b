"""SwiGLU in Hugging Face's form: parameter names and configuration fields, by ``model_type``."""

from __future__ import annotations

from pretrain.errors import InputError
from pretrain.models.channel.swiglu.config import SwiGLUConfig

# Our name within the mixer -> the name within a block of the native class.
KEYS = {
    "xlstm": {
        "projections.gate_weight": "ffn.proj_up_gate.weight",
        "projections.up_weight": "ffn.proj_up.weight",
        "down.weight": "ffn.proj_down.weight",
    }
}


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


FIELDS = {"xlstm": _xlstm_fields}
