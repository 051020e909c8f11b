"""``BambaForCausalLM``: Mamba-2, or attention that rotates half of each head, each with a SwiGLU."""

from __future__ import annotations

from typing import Any

from pretrain.config.model import ModelConfig
from pretrain.convert.native import NativeClass
from pretrain.errors import InputError
from pretrain.models.hugging_face import ANY_TIME_STEP


def _modernised(raw: dict[str, Any]) -> dict[str, Any]:
    """The class rotates half of each head whatever a file says."""
    if raw.get("partial_rotary_factor", 0.5) != 0.5:
        raise InputError(f"partial_rotary_factor is {raw['partial_rotary_factor']!r}, where the class has 0.5 always")
    return raw


def _fields(model: ModelConfig, layer_types: list[str | None]) -> dict[str, Any]:
    return {
        "attn_layer_indices": [layer for layer, kind in enumerate(layer_types) if kind == "full_attention"],
        # The class would never train the embedding of a padding token, and ours is the document mark.
        "pad_token_id": None,
    }


BAMBA = NativeClass(
    model_type="bamba",
    architecture="BambaForCausalLM",
    block="model.layers.{}",
    names={
        "embedding.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.final_layernorm.weight",
        "head.weight": "lm_head.weight",
        "mixer_norm.weight": "input_layernorm.weight",
        "channel_norm.weight": "pre_ff_layernorm.weight",
    },
    parts=((True, True),),
    norm_epsilon="rms_norm_eps",
    layers={"linear_attention": ("mamba2", "swiglu"), "full_attention": ("attention", "swiglu")},
    fields=_fields,
    defaults={"mamba_n_heads": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "time_step_limit": ANY_TIME_STEP},
    counts_by_attention=True,
    modernised=_modernised,
    former=frozenset({"head_dim", "partial_rotary_factor", "rope_scaling", "rope_theta"}),
    # The first is read as the type of each layer, the second of a loss that is not ours to add.
    unread=frozenset({"attn_layer_indices", "z_loss_coefficient", "num_logits_to_keep"}),
)
