"""``GraniteMoeHybridForCausalLM``: Mamba-2, or attention that rotates whole heads or none, each with a SwiGLU.

Beside the SwiGLU of each layer there may be experts that tokens are sent to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.config.model import ModelConfig
from pretrain.convert.multipliers import Multipliers, positive
from pretrain.convert.native import LLAMA_NAMES, LayerTypes, NativeClass
from pretrain.errors import InputError
from pretrain.models.hugging_face import ANY_TIME_STEP

_DENSE: LayerTypes = {"linear_attention": ("mamba2", "swiglu"), "full_attention": ("attention", "swiglu")}
_WITH_EXPERTS: LayerTypes = {"linear_attention": ("mamba2", "moe"), "full_attention": ("attention", "moe")}


def _modernised(raw: dict[str, Any]) -> dict[str, Any]:
    """Without positions, what a file says about their rotation means nothing."""
    if raw.get("normalization_function", "rmsnorm") != "rmsnorm":
        raise InputError(f"normalization_function is {raw['normalization_function']!r}, where the class has rmsnorm")
    if raw.get("position_embedding_type") not in (None, "nope"):
        return raw
    rotary = ("rope_parameters", "rope_scaling", "rope_theta")
    return {key: value for key, value in raw.items() if key not in rotary} | {"position_embedding_type": None}


def _fields(model: ModelConfig, layer_types: list[str | None]) -> dict[str, Any]:
    return {
        "layer_types": layer_types,
        # The class would never train the embedding of a padding token, and ours is the document mark.
        "pad_token_id": None,
    }


def _layers_of(fields: Mapping[str, Any]) -> LayerTypes:
    return _WITH_EXPERTS if fields["num_local_experts"] else _DENSE


def _multipliers(fields: Mapping[str, Any]) -> Multipliers:
    # That of attention is a key of our configuration.
    return Multipliers(
        embedding=positive(fields, "embedding_multiplier"),
        residual=positive(fields, "residual_multiplier"),
        logits=1 / positive(fields, "logits_scaling"),
    )


GRANITE_MOE_HYBRID = NativeClass(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    block="model.layers.{}",
    names=LLAMA_NAMES,
    parts=((True, True),),
    norm_epsilon="rms_norm_eps",
    layers=_DENSE,
    layers_of=_layers_of,
    fields=_fields,
    defaults={"mamba_n_heads": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "time_step_limit": ANY_TIME_STEP},
    counts_by_attention=True,
    multipliers=_multipliers,
    folded=frozenset({"embedding_multiplier", "residual_multiplier", "logits_scaling"}),
    modernised=_modernised,
    former=frozenset({"head_dim", "rope_scaling", "rope_theta"}),
    # Without experts, what is said of them; their losses, which are ours to choose; starts of fresh weights.
    unread=frozenset(
        {
            "intermediate_size",
            "num_experts_per_tok",
            "output_router_logits",
            "router_aux_loss_coef",
            "normalization_function",
            "init_method",
        }
    ),
)
