"""Tiny random models of ``transformers``' own classes, as the library saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from data.tokenizers.huggingface import byte_level_alphabet

SIZES = {"vocab_size": 264, "hidden_size": 32}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_chunk_size": 16}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
    "head_dim": 12,
    "intermediate_size": 48,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 6,
    "n_groups": 2,
    "chunk_size": 16,
    "layer_norm_epsilon": 1e-3,
    "time_step_min": 1e-30,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
DENSE = {"num_hidden_layers": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5, "rope_parameters": ROPE}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GRANITE = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_intermediate_size": 48,
    "num_local_experts": 0,
    "position_embedding_type": "rope",
    "rope_parameters": ROPE,
    "attention_multiplier": 0.2,
}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 24}
MULTIPLIERS = {"embedding_multiplier": 5, "residual_multiplier": 0.7, "logits_scaling": 0.3}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "xlstm": (
        "xlstm",
        {"embedding_dim": 32, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 2, "eps": 1e-3, "norm_eps": 1e-3},
    ),
    "mamba2": (
        "mamba2",
        {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 16},
    ),
    "mamba2, tied": (
        "mamba2",
        {
            "num_hidden_layers": 1,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 6,
            "n_groups": 1,
            "use_conv_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "nemotron": ("nemotron_h", ATTENTION | NEMOTRON),
    "bamba": (
        "bamba",
        ATTENTION | MAMBA | {"num_hidden_layers": 3, "attn_layer_indices": [1], "intermediate_size": 48},
    ),
    "granite": (
        "granitemoehybrid",
        ATTENTION
        | MAMBA
        | GRANITE
        | {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "tie_word_embeddings": True,
        },
    ),
    "granite, experts": ("granitemoehybrid", ATTENTION | MAMBA | GRANITE | EXPERTS),
    "granite, multipliers": (
        "granitemoehybrid",
        ATTENTION | MAMBA | GRANITE | {"attention_bias": True, "position_embedding_type": None} | MULTIPLIERS,
    ),
    "granite, experts and multipliers": (
        "granitemoehybrid",
        ATTENTION | MAMBA | GRANITE | EXPERTS | MULTIPLIERS | {"tie_word_embeddings": True},
    ),
    "llama": ("llama", ATTENTION | DENSE | {"head_dim": 12, "tie_word_embeddings": True}),
    "llama, biases": ("llama", ATTENTION | DENSE | {"attention_bias": True}),
    "llama, scaled positions": (
        "llama",
        ATTENTION | DENSE | {"rope_parameters": LLAMA3, "max_position_embeddings": 256},
    ),
    "mistral": ("mistral", ATTENTION | DENSE | {"head_dim": 12, "sliding_window": 24}),
    "qwen2": ("qwen2", ATTENTION | DENSE | {"use_sliding_window": False, "sliding_window": 24}),
    "qwen3": ("qwen3", ATTENTION | DENSE | {"head_dim": 12, "tie_word_embeddings": True}),
}


@torch.no_grad()
def random_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of a class in which every parameter is random, what would start at zero included."""
    model_type, fields = CLASSES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZES, **fields)).eval()
    for parameter_name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape)
        if parameter.dim() > 1 and (model.config.tie_word_embeddings or "embed" not in parameter_name):
            values *= parameter[0].numel() ** -0.5
        elif "norm" in parameter_name:
            values = 1 + 0.3 * values
        parameter.copy_(values)
    return model.to(dtype)


def tensors_in(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    kept = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))


def add_tokenizer(directory: Path, marks: dict[str, Any]) -> None:
    """Bytes, and one special token, which is id 256."""
    library = Tokenizer(models.BPE(vocab=dict(byte_level_alphabet()), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|end|>"])
    library.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(marks))
