"""``NemotronHForCausalLM``: one mixer or one feed-forward network per layer, attention without positions."""

from __future__ import annotations

from typing import Any

from pretrain.config.schema import ModelConfig
from pretrain.convert.native import NativeClass
from pretrain.models.hugging_face import ANY_TIME_STEP


def _fields(model: ModelConfig, layer_types: list[str | None]) -> dict[str, Any]:
    return {
        "layers_block_type": layer_types,
        "layer_norm_epsilon": model.norm_epsilon,
        "residual_in_fp32": False,
        "use_bias": False,
        # Only for fresh weights.
        "rescale_prenorm_residual": False,
    }


NEMOTRON_H = NativeClass(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    # The prefix in files; modules are called model.
    block="backbone.layers.{}",
    names={
        "embedding.weight": "backbone.embeddings.weight",
        "output_norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
        "mixer_norm.weight": "norm.weight",
        "channel_norm.weight": "norm.weight",
    },
    parts=((True, False), (False, True)),
    fields=_fields,
    defaults={"time_step_limit": ANY_TIME_STEP},
    ties_embeddings=False,
    counts_by_attention=True,
)
