"""Dense transformers of Llama's layout, each layer attention and a SwiGLU: Llama, Mistral, Qwen2 and Qwen3.

They differ in their attention: ``MistralForCausalLM`` may have a sliding window, ``Qwen2ForCausalLM`` has biases of
queries, keys and values, and ``Qwen3ForCausalLM`` norms of queries and keys.
"""

from __future__ import annotations

from typing import Any

from pretrain.config.model import ModelConfig
from pretrain.convert.native import LLAMA_NAMES, NativeClass


def _fields(model: ModelConfig, layer_types: list[str | None]) -> dict[str, Any]:
    # The class would never train the embedding of a padding token, and ours is the document mark.
    return {"pad_token_id": None}


def _dense(model_type: str, architecture: str, *unread: str) -> NativeClass:
    """A class of this layout; ``unread`` are fields of its own that change nothing."""
    return NativeClass(
        model_type=model_type,
        architecture=architecture,
        block="model.layers.{}",
        names=LLAMA_NAMES,
        parts=((True, True),),
        norm_epsilon="rms_norm_eps",
        layers={None: ("attention", "swiglu")},
        fields=_fields,
        former=frozenset({"rope_scaling", "rope_theta"}),
        cures={
            "rope_parameters": "of scaled rotary positions only rope_type llama3 is supported",
            "use_sliding_window": "of this class only models that see the whole text in every layer",
        },
        unread=frozenset(unread),
    )


LLAMA = _dense("llama", "LlamaForCausalLM", "pretraining_tp")
MISTRAL = _dense("mistral", "MistralForCausalLM")
# Layer types are derived from use_sliding_window, where a file does not list them.
QWEN2 = _dense("qwen2", "Qwen2ForCausalLM", "max_window_layers", "use_mrope")
QWEN3 = _dense("qwen3", "Qwen3ForCausalLM", "max_window_layers")
