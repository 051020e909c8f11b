"""``xLSTMForCausalLM``: blocks of mLSTM and SwiGLU, by the forms that the two mixers declare."""

from __future__ import annotations

from typing import Any

from pretrain.config.schema import BlockConfig, ModelConfig
from pretrain.errors import InputError
from pretrain.models.registry import MixerConfig, family_of

MODEL_TYPE = "xlstm"
ARCHITECTURE = "xLSTMForCausalLM"

# The class caps its logits always. So wide a cap changes no float32: tanh(x) rounds to x.
_NO_CAP = 1e9

# Sizes of the class's recurrent state are rounded up to this, while its layers' own are not.
_STATE_MULTIPLE = 64

# Fields that do not depend on the model.
_FIXED: dict[str, Any] = {
    # The one mode that takes any sequence length; it trains as well, once the cache is off.
    "mode": "inference",
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
    "chunk_size": 64,
    "return_last_states": True,
    "autocast_kernel_dtype": "float32",
    "inference_state_dtype": "float32",
    "weight_mode": "single",
    "use_bias": False,
    "add_out_norm": True,
    "norm_reduction_force_float32": True,
    "tie_word_embeddings": False,
    # With a cache the class writes its state in place and its backward pass fails, so training would. For
    # generation, generation_config.json turns the cache on.
    "use_cache": False,
}


def unfit_layers(model: ModelConfig) -> list[str]:
    """Each layer that this class cannot hold, in words; empty where it can hold the model."""
    unfit = []
    for layer in range(model.num_layers):
        block = model.block(layer)
        kinds = [family_of(part).name if part else "none" for part in (block.mixer, block.channel)]
        if kinds != ["mlstm", "swiglu"]:
            unfit.append(f"layer {layer} (mixer {kinds[0]}, channel {kinds[1]})")
    return unfit


def tensor_names(model: ModelConfig) -> dict[str, str]:
    """Our global parameter names -> names in the class's state dict; tensors are the same."""
    names = {
        "embedding.weight": "backbone.embeddings.weight",
        "output_norm.weight": "backbone.out_norm.weight",
        "head.weight": "lm_head.weight",
    }
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"backbone.blocks.{layer}"
        names[f"{ours}.mixer_norm.weight"] = f"{theirs}.norm_mlstm.weight"
        names[f"{ours}.channel_norm.weight"] = f"{theirs}.norm_ffn.weight"
        for part, config in _parts(model.block(layer)):
            for inner, outer in family_of(config).hugging_face.KEYS[MODEL_TYPE].items():
                names[f"{ours}.{part}.{inner}"] = f"{theirs}.{outer}"
    return names


def config_fields(model: ModelConfig) -> dict[str, Any]:
    """``xLSTMConfig``'s fields.

    Raises:
        InputError: two parts of the model need different values of one field.
    """
    cap = model.output_logit_soft_cap
    fields = _FIXED | {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "embedding_dim": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_blocks": model.num_layers,
        "norm_eps": model.norm_epsilon,
        "output_logit_soft_cap": _NO_CAP if cap is None else cap,
    }
    origin = dict.fromkeys(fields, "model")
    for name in sorted(set(model.layers)):
        for part, config in _parts(model.blocks[name]):
            here = f"model.blocks.{name}.{part}"
            declared = family_of(config).hugging_face.FIELDS[MODEL_TYPE](config, model.hidden_size)
            for key, value in declared.items():
                if fields.setdefault(key, value) != value:
                    raise InputError(
                        f"{ARCHITECTURE} has one {key} for the whole model, but {origin[key]} needs {fields[key]} "
                        f"and {here} needs {value}; only a model that agrees on it can be exported"
                    )
                origin.setdefault(key, here)
    return fields


def can_cache_state(fields: dict[str, Any]) -> bool:
    """Whether the class's cache has the shape of its layers' state, so that generation may use it.

    The cache rounds the widths of keys and values up to a multiple of 64, the layers do not
    (transformers 5.23).
    """
    widths = (int(fields["hidden_size"] * fields[name]) for name in ("qk_dim_factor", "v_dim_factor"))
    return all(width % _STATE_MULTIPLE == 0 for width in widths)


def _parts(block: BlockConfig) -> list[tuple[str, MixerConfig]]:
    return [("mixer", block.mixer), ("channel", block.channel)]
