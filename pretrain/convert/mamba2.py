"""``Mamba2ForCausalLM``: blocks of Mamba-2 alone."""

from __future__ import annotations

from typing import Any

from pretrain.config.model import ModelConfig
from pretrain.convert.native import NativeClass


def _fields(model: ModelConfig, layer_types: list[str | None]) -> dict[str, Any]:
    # Training kept the residual stream in the dtype of the activations.
    return {"residual_in_fp32": False, "use_bias": False}


MAMBA2 = NativeClass(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    block="backbone.layers.{}",
    names={
        "embedding.weight": "backbone.embeddings.weight",
        "output_norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
        "mixer_norm.weight": "norm.weight",
    },
    parts=((True, False),),
    norm_epsilon="layer_norm_epsilon",
    layers={None: ("mamba2", None)},
    fields=_fields,
    unread=frozenset(
        {"rescale_prenorm_residual", "time_step_rank", "time_step_min", "time_step_max", "time_step_floor"}
    ),
    rounding={"residual_in_fp32": "the residual stream has the dtype of train.precision"},
)
