"""``NemotronHForCausalLM``: one mixer or one feed-forward network per layer, attention without positions."""

from __future__ import annotations

from typing import Any

from pretrain.config.model import ModelConfig
from pretrain.convert.native import NativeClass
from pretrain.errors import InputError
from pretrain.models.hugging_face import ANY_TIME_STEP

# Layers of experts are refused by their type.
_OF_EXPERTS = (
    "moe_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_overlap",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "output_router_logits",
    "routed_scaling_factor",
    "topk_group",
)


def _modernised(raw: dict[str, Any]) -> dict[str, Any]:
    """Files of before the class was in ``transformers`` name heads' size otherwise, and the norms' epsilon twice."""
    fields = dict(raw)
    for former, name in (("attention_head_dim", "head_dim"), ("rms_norm_eps", "layer_norm_epsilon")):
        if former in fields:
            value = fields.pop(former)
            if fields.setdefault(name, value) != value:
                raise InputError(f"{former} is {value!r}, but {name} is {fields[name]!r}, which are one")
    return fields


def _fields(model: ModelConfig, layer_types: list[str | None]) -> dict[str, Any]:
    return {
        "layers_block_type": layer_types,
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
    norm_epsilon="layer_norm_epsilon",
    layers={"linear_attention": ("mamba2", None), "full_attention": ("attention", None), "mlp": (None, "mlp")},
    fields=_fields,
    defaults={"time_step_limit": ANY_TIME_STEP},
    ties_embeddings=False,
    counts_by_attention=True,
    modernised=_modernised,
    former=frozenset(
        {
            "attention_head_dim",
            "rms_norm_eps",
            "hybrid_override_pattern",
            "mtp_hybrid_override_pattern",
            "num_hidden_layers",
            "mamba_chunk_size",
            "mamba_conv_bias",
            "mamba_d_conv",
            "mamba_dt_init_floor",
            "mamba_dt_limit",
            "mamba_dt_max",
            "mamba_dt_min",
            "mamba_expand",
            "mamba_n_groups",
        }
    ),
    unread=frozenset(
        {
            "expand",
            "mamba_ssm_cache_dtype",
            "max_position_embeddings",
            "mtp_layers_block_type",
            "num_logits_to_keep",
            "rescale_prenorm_residual",
            "time_step_floor",
            "time_step_max",
            "use_mamba_kernels",
            *_OF_EXPERTS,
        }
    ),
    cures={
        "time_step_min": "the class raises step sizes to it, as no other class and no layer of ours does; where the "
        "weights were trained without a least step size, set it to 1e-30"
    },
    rounding={"residual_in_fp32": "the residual stream has the dtype of train.precision"},
)
