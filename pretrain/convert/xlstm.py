"""``xLSTMForCausalLM``: blocks of mLSTM and SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.config.model import ModelConfig
from pretrain.convert.native import NativeClass

# The class caps its logits always. So wide a cap changes no float32: tanh(x) rounds to x.
NO_CAP = 1e9

# Sizes of the class's recurrent state are rounded up to this, while its layers' own are not.
_STATE_MULTIPLE = 64

# Fields that choose how the class computes, not what.
_KERNELS: dict[str, Any] = {
    # The one mode that takes any sequence length; it trains as well, once the cache is off.
    "mode": "inference",
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
    "chunk_size": 64,
    "return_last_states": True,
    "autocast_kernel_dtype": "float32",
    "inference_state_dtype": "float32",
}

# Further fields that do not depend on the model.
_FIXED: dict[str, Any] = _KERNELS | {
    "weight_mode": "single",
    "use_bias": False,
    "add_out_norm": True,
    "norm_reduction_force_float32": True,
    # With a cache the class writes its state in place and its backward pass fails, so training would. For
    # generation, generation_config.json turns the cache on.
    "use_cache": False,
}


def _fields(model: ModelConfig, layer_types: list[str | None]) -> dict[str, Any]:
    cap = model.output_logit_soft_cap
    return _FIXED | {
        "embedding_dim": model.hidden_size,
        "num_blocks": model.num_layers,
        "output_logit_soft_cap": NO_CAP if cap is None else cap,
    }


def _model_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    cap = fields["output_logit_soft_cap"]
    return {"output_logit_soft_cap": None if cap >= NO_CAP else cap}


def _modernised(raw: dict[str, Any]) -> dict[str, Any]:
    """Files of before the class was in ``transformers`` name kernels of another package, and sizes only once."""
    # The class's cache cannot hold every model's state.
    fields = raw | _KERNELS | {"use_cache": False}
    for name, former in (("hidden_size", "embedding_dim"), ("num_hidden_layers", "num_blocks")):
        if former in raw:
            fields.setdefault(name, raw[former])
        elif name in raw:
            fields[former] = raw[name]
    return fields


def can_cache_state(fields: Mapping[str, Any]) -> bool:
    """Whether the class's cache has the shape of its layers' state, so that generation may use it.

    The cache rounds the widths of keys and values up to a multiple of 64, the layers do not
    (transformers 5.23).
    """
    widths = (int(fields["hidden_size"] * fields[name]) for name in ("qk_dim_factor", "v_dim_factor"))
    return all(width % _STATE_MULTIPLE == 0 for width in widths)


XLSTM = NativeClass(
    model_type="xlstm",
    architecture="xLSTMForCausalLM",
    block="backbone.blocks.{}",
    names={
        "embedding.weight": "backbone.embeddings.weight",
        "output_norm.weight": "backbone.out_norm.weight",
        "head.weight": "lm_head.weight",
        "mixer_norm.weight": "norm_mlstm.weight",
        "channel_norm.weight": "norm_ffn.weight",
    },
    parts=((True, True),),
    norm_epsilon="norm_eps",
    layers={None: ("mlstm", "swiglu")},
    fields=_fields,
    ties_embeddings=False,
    caps_logits=True,
    masks_padding=False,
    # Its products in torch alone are of float32 gates with the activations (transformers 5.23).
    computes_in_bfloat16=False,
    caches_state=can_cache_state,
    model_keys=_model_keys,
    modernised=_modernised,
    unread=frozenset(
        {
            "max_inference_chunksize",
            # Of published files; the class has never read them.
            "add_embedding_dropout",
            "add_forward_backend_padding",
            "add_post_blocks_norm",
            "add_post_norm",
            "add_qk_norm",
            "cell_norm_eps",
            "force_bos_token_insert",
            "head_dim",
            "igate_bias_init_range",
            "mlstm_round_up_to_multiple_of",
        }
    ),
    rounding={"norm_reduction_force_float32": "norms are computed in float32"},
)


def config_fields(model: ModelConfig) -> dict[str, Any]:
    """``xLSTMConfig``'s fields.

    Raises:
        InputError: two parts of the model need different values of one field.
    """
    return XLSTM.config_fields(model)


def tensor_names(model: ModelConfig) -> dict[str, str]:
    """Our global parameter names -> names in the class's state dict; tensors are the same."""
    return {name: str(place) for name, place in XLSTM.places(model).items()}
