"""``GraniteMoeHybridForCausalLM``: Mamba-2, or attention that rotates whole heads or none, each with a SwiGLU."""

from __future__ import annotations

from typing import Any

from pretrain.config.schema import ModelConfig
from pretrain.convert.native import LLAMA_NAMES, NativeClass
from pretrain.models.hugging_face import ANY_TIME_STEP


def _modernised(raw: dict[str, Any]) -> dict[str, Any]:
    """Without positions, what a file says about their rotation means nothing."""
    if raw.get("position_embedding_type") not in (None, "nope"):
        return raw
    rotary = ("rope_parameters", "rope_scaling", "rope_theta")
    return {key: value for key, value in raw.items() if key not in rotary} | {"position_embedding_type": None}


def _fields(model: ModelConfig, layer_types: list[str | None]) -> dict[str, Any]:
    return {
        "layer_types": layer_types,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        # The class would never train the embedding of a padding token, and ours is the document mark.
        "pad_token_id": None,
    }


GRANITE_MOE_HYBRID = NativeClass(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    block="model.layers.{}",
    names=LLAMA_NAMES,
    parts=((True, True),),
    norm_epsilon="rms_norm_eps",
    layers={"linear_attention": ("mamba2", "swiglu"), "full_attention": ("attention", "swiglu")},
    fields=_fields,
    defaults={"mamba_n_heads": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "time_step_limit": ANY_TIME_STEP},
    counts_by_attention=True,
    modernised=_modernised,
    former=frozenset({"rope_scaling", "rope_theta"}),
    # Of experts, which are refused by their number.
    unread=frozenset({"intermediate_size", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"}),
)
