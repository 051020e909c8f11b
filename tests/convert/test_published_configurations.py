"""config.json as published models have it: what is imported of them, and why others are refused.

Fields and values are those of the files on the hub as their users quote them; no weights were tried.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pretrain.config import Config
from pretrain.convert.class_configuration import ClassConfiguration, read_class_configuration
from pretrain.errors import InputError
from pretrain.plan import plan
from tests.configurations import tiny_config

# nvidia/Nemotron-H-8B-Base-8K, of before the class was in transformers.
NEMOTRON_H_8B: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_head_dim": 128,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "initializer_range": 0.02,
    "intermediate_size": 21504,
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 128,
    "mamba_proj_bias": False,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 8,
    "num_attention_heads": 32,
    "num_hidden_layers": 52,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rms_norm_eps": 1e-5,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}
# The sizes of mistralai/Mamba-Codestral-7B-v0.1 and NX-AI/xLSTM-7b are the classes' own defaults.
MAMBA_CODESTRAL_7B = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "vocab_size": 32768}
XLSTM_7B = {"architectures": ["xLSTMForCausalLM"], "model_type": "xlstm", "vocab_size": 50304, "norm_eps": 1e-6}
# ibm-ai-platform/Bamba-9B: the defaults again, and where it has attention.
BAMBA_9B = {
    "architectures": ["BambaForCausalLM"],
    "model_type": "bamba",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "mamba_d_state": 128,
    "attn_layer_indices": [9, 18, 27],
}
# ibm-granite/granite-4.0-h-350m.
GRANITE_4_H_350M: dict[str, Any] = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "attention_bias": False,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12,
    "eos_token_id": 100257,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "layer_types": ["attention" if layer in (10, 13, 17, 27) else "mamba" for layer in range(32)],
    "logits_scaling": 3,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "mamba_n_heads": 48,
    "mamba_proj_bias": False,
    "max_position_embeddings": 32768,
    "num_attention_heads": 12,
    "num_experts_per_tok": 0,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "num_local_experts": 0,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.246,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "shared_intermediate_size": 2048,
    "tie_word_embeddings": True,
    "vocab_size": 100352,
}

# ibm-granite/granite-4.0-h-tiny.
GRANITE_4_H_TINY: dict[str, Any] = GRANITE_4_H_350M | {
    "attention_multiplier": 0.0078125,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 512,
    "layer_types": ["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)],
    "logits_scaling": 6,
    "mamba_d_head": 64,
    "normalization_function": "rmsnorm",
    "num_experts_per_tok": 6,
    "num_hidden_layers": 40,
    "num_local_experts": 64,
    "output_router_logits": False,
    "residual_multiplier": 0.22,
    "rope_scaling": None,
    "router_aux_loss_coef": 0.0,
    "shared_intermediate_size": 1024,
}


def read(directory: Path, fields: dict[str, Any]) -> ClassConfiguration:
    (directory / "config.json").write_text(json.dumps(fields))
    return read_class_configuration(directory, 1000)


def imported(directory: Path, fields: dict[str, Any]) -> Config:
    """The configuration that an import makes of the file; every field was compared."""
    there = read(directory, fields)
    config = tiny_config(model={"output_logit_soft_cap": None} | there.model_section())
    there.compare(config.model)
    return config


def test_nemotron_h_8b(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="time_step_min is 0.001, where only 1e-30 .* set it to 1e-30"):
        imported(tmp_path, NEMOTRON_H_8B)
    config = imported(tmp_path, NEMOTRON_H_8B | {"time_step_min": 1e-30})
    assert plan(config).parameters == 8_100_852_736
    kinds = [next(iter(config.model.block(layer).model_dump(exclude_none=True))) for layer in range(52)]
    assert kinds.count("mixer") == 28 and kinds.count("channel") == 24
    types = [block.mixer.type for block in map(config.model.block, range(52)) if block.mixer]
    assert types.count("attention") == 4
    with pytest.raises(InputError, match="rms_norm_eps is 1e-06, but layer_norm_epsilon is 1e-05, which are one"):
        read(tmp_path, NEMOTRON_H_8B | {"rms_norm_eps": 1e-6})
    assert read(tmp_path, NEMOTRON_H_8B | {"attention_head_dim": 64}).fields["head_dim"] == 64


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [(MAMBA_CODESTRAL_7B, 7_285_403_648), (XLSTM_7B, 6_865_424_896), (BAMBA_9B, None)],
)
def test_other_models_of_seven_billion(tmp_path: Path, fields: dict[str, Any], parameters: int | None) -> None:
    """Parameters are as many as the class has."""
    found = plan(imported(tmp_path, fields)).parameters
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(read(tmp_path, fields).config)
    assert found == theirs.num_parameters() and parameters in (found, None)


def test_granite_4_with_its_multipliers(tmp_path: Path) -> None:
    """Parameters are as many as the class has, also of 64 experts in 40 layers; multipliers go into them."""
    for fields, layers in ((GRANITE_4_H_350M, 32), (GRANITE_4_H_TINY, 40)):
        config = imported(tmp_path, fields)
        there = read(tmp_path, fields)
        with torch.device("meta"):
            theirs = AutoModelForCausalLM.from_config(there.config)
        assert plan(config).parameters == theirs.num_parameters()
        assert config.model.num_layers == layers
        names = ("embedding.weight", "output_norm.weight", "layers.0.mixer.output.weight", "layers.0.mixer.skip")
        scaling, residual = fields["logits_scaling"], fields["residual_multiplier"]
        assert there.factors(config.model, names) == {
            "embedding.weight": 12,
            "output_norm.weight": 1 / scaling / 12,
            "layers.0.mixer.output.weight": residual,
        }
