"""Import: what is wrong with a directory is said in words, all at once where it can be, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from pretrain.convert import import_model
from pretrain.errors import InputError
from tests.convert.native_models import add_tokenizer, change_config, tensors_in


def test_every_wrong_tensor_is_named_at_once(copied: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    directory = copied("bamba")
    weights = tensors_in(directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    del weights["model.layers.0.mamba.D"], weights["model.layers.1.self_attn.q_proj.weight"]
    weights["model.layers.2.mamba.in_proj.weight"] = torch.randn(7, 32)
    weights["model.norm.weight"] = torch.ones(32)
    weights["lm_head.weight"] = weights["lm_head.weight"].double()
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(InputError) as error:
        import_model(directory, tmp_path / "imported", base=base)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "missing: model.layers.0.mamba.D, [8]",
        "missing: model.layers.1.self_attn.q_proj.weight, [32, 32]",
        "lm_head.weight is F64, where one of F32, BF16, F16 is expected",
        "model.layers.2.mamba.in_proj.weight is [7, 32], where [160, 32] is expected",
        "not of this model: model.norm.weight, [32]",
    ]
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf", "base.yaml"}


def _replace_files(directory: Path, name: str) -> None:
    for file in directory.glob("model*"):
        file.unlink()
    (directory / name).write_bytes(b"\x80\x04K\x01.")


def _index(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def _first_shard(directory: Path) -> Path:
    return next(directory.glob("model-00001-*"))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no configuration": ("mamba2", lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "no JSON": ("mamba2", lambda d: (d / "config.json").write_text("{"), "config.json is not readable JSON"),
    "no object": ("mamba2", lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
    "another class": (
        "mamba2",
        lambda d: change_config(d, architectures=["GemmaForCausalLM"]),
        'architecture "GemmaForCausalLM", where one of xLSTMForCausalLM, .* can be imported',
    ),
    "another type": ("mamba2", lambda d: change_config(d, model_type="bamba"), 'model_type is "bamba", but'),
    "unknown field": ("bamba", lambda d: change_config(d, logit_bias=3), "logit_bias=3: BambaForCausalLM has no such"),
    "biases": ("xlstm", lambda d: change_config(d, use_bias=True), "use_bias is true, where only false"),
    "fused weights": ("xlstm", lambda d: change_config(d, weight_mode="fused"), 'weight_mode is "fused"'),
    "two widths": ("xlstm", lambda d: change_config(d, embedding_dim=16), "embedding_dim is 16, where only 32"),
    "no multiplier": (
        "granite",
        lambda d: change_config(d, embedding_multiplier=0),
        "config.json: embedding_multiplier is 0, where a number above 0 is expected",
    ),
    "endless multiplier": (
        "granite",
        lambda d: change_config(d, residual_multiplier=float("inf")),
        "residual_multiplier is inf, where a number above 0",
    ),
    "no heads": (
        "granite",
        lambda d: change_config(d, num_attention_heads=0),
        "config.json: head_dim can be told neither from the file nor from its other fields",
    ),
    "a dtype that is none": (
        "mamba2",
        lambda d: change_config(d, dtype=1e-300),
        "config.json: transformers refuses it for Mamba2ForCausalLM",
    ),
    "multiplier that is null": (
        "granite",
        lambda d: change_config(d, logits_scaling=None),
        "logits_scaling is None, where a number above 0",
    ),
    "another norm": (
        "granite",
        lambda d: change_config(d, normalization_function="layernorm"),
        "normalization_function is 'layernorm', where the class has rmsnorm",
    ),
    "experts that are not there": (
        "granite",
        lambda d: change_config(d, num_local_experts=4, num_experts_per_tok=2, intermediate_size=8),
        r"missing: model.layers.0.block_sparse_moe.input_linear.weight, \[4, 16, 32\]",
    ),
    "one expert": (
        "granite, experts",
        lambda d: change_config(d, num_local_experts=1),
        "num_local_experts is 1, where with experts at least 2 can be imported",
    ),
    "one expert for a token": (
        "granite, experts",
        lambda d: change_config(d, num_experts_per_tok=1),
        "num_experts_per_tok is 1, where with experts at least 2 can be imported",
    ),
    "more experts for a token than there are": (
        "granite, experts",
        lambda d: change_config(d, num_experts_per_tok=6),
        "experts_per_token=6 is more than num_experts=5",
    ),
    "experts without number": (
        "granite, experts",
        lambda d: change_config(d, num_local_experts=None),
        "num_local_experts is null, where only 0",
    ),
    "scaled positions": (
        "bamba",
        lambda d: change_config(
            d, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        ),
        "rope_parameters is ",
    ),
    "scaled positions of yarn": (
        "llama",
        lambda d: change_config(
            d,
            rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
            rope_theta=500.0,
            rope_parameters=...,
        ),
        "rope_parameters is .*yarn.*, where only .*default.* can be imported .*only rope_type llama3 is supported",
    ),
    "biases of a feed-forward network": ("llama", lambda d: change_config(d, mlp_bias=True), "mlp_bias is true, where"),
    "windows in some layers": (
        "qwen2",
        lambda d: change_config(d, use_sliding_window=True, max_window_layers=1, layer_types=...),
        "use_sliding_window is true, where only false",
    ),
    "rotated part": ("bamba", lambda d: change_config(d, partial_rotary_factor=0.25), "partial_rotary_factor is 0.25"),
    "activation": ("nemotron", lambda d: change_config(d, mlp_hidden_act="tanh"), "mlp_hidden_act is 'tanh'"),
    "layer type": (
        "nemotron",
        lambda d: change_config(d, layers_block_type=["moe", "full_attention"], num_hidden_layers=2),
        "layer 0 is of type 'moe'",
    ),
    "least step size": (
        "nemotron",
        lambda d: change_config(d, time_step_min=0.001),
        "time_step_min is 0.001, .*set it to 1e-30",
    ),
    "limited step size": (
        "mamba2",
        lambda d: change_config(d, time_step_limit=[0.0, 0.5]),
        r"time_step_limit is \[0.0, 0.5\]",
    ),
    "number of layers": ("nemotron", lambda d: change_config(d, num_hidden_layers=5), "but there are types of 4"),
    "far too many layers": (
        "mamba2",
        lambda d: change_config(d, num_hidden_layers=10**12),
        "weight files hold 21 tensors",
    ),
    "far too wide": (
        "xlstm",
        lambda d: change_config(d, hidden_size=2**40, embedding_dim=2**40),
        "parameters, but the weight files hold only",
    ),
    "heads": ("xlstm", lambda d: change_config(d, num_heads=3), "num_heads=3 does not divide"),
    "type of a field": ("mamba2", lambda d: change_config(d, state_size="6"), "transformers refuses it for Mamba2"),
    "pickle": (
        "mamba2",
        lambda d: _replace_files(d, "pytorch_model.bin"),
        "pytorch_model.bin, a pickle, .* save_pretrained",
    ),
    "no weights": ("mamba2", lambda d: _replace_files(d, "other"), "holds neither model.safetensors nor"),
    "weights twice": (
        "mamba2",
        lambda d: shutil.copy(_first_shard(d), d / "model.safetensors"),
        "holds both model.safetensors and",
    ),
    "no map": ("mamba2", lambda d: (d / "model.safetensors.index.json").write_text("{}"), "'weight_map' must name"),
    "shard outside": (
        "mamba2",
        lambda d: _index(d, lambda places: places.update({"lm_head.weight": "../secret.safetensors"})),
        "'../secret.safetensors' is refused",
    ),
    "shard of half a character": (
        "mamba2",
        lambda d: _index(d, lambda places: places.update({"lm_head.weight": "\ud800"})),
        r"the file name '\\ud800' is refused, because it holds half a character",
    ),
    "tensor of half a character": (
        "mamba2",
        lambda d: _index(d, lambda places: places.update({"\udfff": _first_shard(d).name})),
        r"the tensor name '\\udfff' in 'weight_map' holds half a character",
    ),
    "shard missing": ("mamba2", lambda d: _first_shard(d).unlink(), "model-00001-.* is missing"),
    "shard a link": (
        "mamba2",
        lambda d: (
            (_first_shard(d).rename(d.parent / "moved"), (d / "config.json").exists())
            and _first_missing(d).symlink_to(d.parent / "moved")
        ),
        "is a link to .*moved, outside",
    ),
    "index without a tensor": (
        "mamba2",
        lambda d: _index(d, lambda places: places.pop("backbone.layers.0.mixer.D")),
        "holds backbone.layers.0.mixer.D, but model.safetensors.index.json does not say so",
    ),
    "index with one more": (
        "mamba2",
        lambda d: _index(d, lambda places: places.update({"more": _first_shard(d).name})),
        "holds more, but it does not",
    ),
    "cut short": (
        "mamba2",
        lambda d: os.truncate(_first_shard(d), _first_shard(d).stat().st_size - 4),
        "no sound safetensors file",
    ),
    "no header": ("mamba2", lambda d: _first_shard(d).write_bytes(b"\xff" * 40), "no sound safetensors file"),
    "empty": ("mamba2", lambda d: _first_shard(d).write_bytes(b""), "no sound safetensors file"),
}


def _first_missing(directory: Path) -> Path:
    """The first file that the index names and the directory lacks."""
    places = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    return next(directory / name for name in sorted(set(places.values())) if not (directory / name).exists())


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_wrong_is_said(case: str, copied: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    name, damage, message = DAMAGE[case]
    directory = copied(name)
    damage(directory)
    before = {entry.name for entry in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message):
        import_model(directory, tmp_path / "imported", base=base, check=False)
    assert {entry.name for entry in tmp_path.iterdir()} == before


def test_output_base_and_tokenizer_are_looked_at_first(
    copied: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    directory = copied("mamba2")
    with pytest.raises(InputError, match=r"hf is not empty; .* to import into"):
        import_model(directory, directory, base=base)
    with pytest.raises(InputError, match="is not a directory; give one that holds config.json"):
        import_model(tmp_path / "absent", tmp_path / "imported", base=base)
    with pytest.raises(InputError, match=r"no tokenizer.json; give --config BASE.yaml with a data.tokenizer"):
        import_model(directory, tmp_path / "imported")
    add_tokenizer(directory, {})
    change_config(directory, eos_token_id=None, bos_token_id=None)
    with pytest.raises(InputError, match="names an eos_token or bos_token"):
        import_model(directory, tmp_path / "imported")
    (directory / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}')
    with pytest.raises(
        InputError, match=r"tokenizer_config.json: eos_token is '\\ud800', which holds half a character"
    ):
        import_model(directory, tmp_path / "imported")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer.json"):
        import_model(directory, tmp_path / "imported")
    raw = yaml.safe_load(base.read_text())
    base.write_text(yaml.safe_dump(raw | {"model": {"vocab_size": 3}}))
    with pytest.raises(InputError, match="has a model section, but the model is that of the weights"):
        import_model(directory, tmp_path / "imported", base=base)
    base.write_text(yaml.safe_dump(raw | {"parallel": {"tensor": 3}}))
    with pytest.raises(InputError, match=r"config.json with .*base.yaml: .*parallel.tensor=3"):
        import_model(directory, tmp_path / "imported", base=base)
    assert not (tmp_path / "imported").exists()
