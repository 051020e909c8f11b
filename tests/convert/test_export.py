"""Export: transformers computes the same logits and text, what cannot be expressed is refused in words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tokenizers.byte_level import ByteTokenizer
from pretrain.convert import custom, export_model, huggingface
from pretrain.convert.comparison import COMPARED_LENGTHS, LOGIT_TOLERANCE
from pretrain.errors import InputError
from pretrain.generate import generate
from pretrain.models.mlstm import hf as mlstm_form
from tests.configurations import tiny_config
from tests.convert.checkpoints import model_section, random_tokens, write_run

# float32 on both sides, sums in another order.
TOLERANCE = LOGIT_TOLERANCE

# Hidden size 128 with half of it for keys: the smallest whose state Hugging Face's cache can hold.
CACHED = {"hidden_size": 128}

MODELS = {
    "tiny": model_section(),
    "cached": model_section(**CACHED),
    "uncapped": model_section(output_logit_soft_cap=None),
    "wide heads": model_section({"num_heads": 2, "query_key_factor": 1.0, "value_factor": 2.0}),
    "given inner width": model_section(channel={"intermediate_size": 100}),
    "rounded inner width": model_section(channel={"projection_factor": 1.5, "round_up_to": 40}),
    "epsilons and caps": model_section(
        {"norm_epsilon": 1e-2, "cell_epsilon": 1e-2, "gate_soft_cap": 3.0},
        norm_epsilon=1e-2,
        output_logit_soft_cap=4.0,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_our_logits(tmp_path: Path, name: str) -> None:
    run, decoder = write_run(tmp_path / "run", MODELS[name])
    report = export_model(run, tmp_path / "out")
    assert report.comparison.largest_difference <= report.comparison.tolerance <= TOLERANCE
    assert report.parameters == sum(parameter.numel() for parameter in decoder.parameters())
    assert (report.step, report.comparison.lengths, report.architecture) == (
        7,
        COMPARED_LENGTHS,
        "xLSTMForCausalLM",
    )
    assert report.cached_generation == (name in ("cached", "wide heads"))

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == torch.float32
    tokens = random_tokens(3, 150)
    ours, _ = decoder.logits(tokens)
    torch.testing.assert_close(exported(input_ids=tokens).logits, ours, atol=TOLERANCE, rtol=0)
    assert ours.std() > 0.5  # far above the tolerance


def test_the_files(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run")
    output = tmp_path / "a" / "new" / "directory"
    export_model(run, output)
    assert {file.name for file in output.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len({file.stat().st_mode for file in output.iterdir()}) == 1
    config = json.loads((output / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["mode"]) == ("xlstm", 264, "inference")
    assert (config["bos_token_id"], config["eos_token_id"], config["use_cache"]) == (256, 256, False)
    assert [entry.name for entry in output.parent.iterdir()] == ["directory"]


def test_large_models_are_split_with_an_index(tmp_path: Path) -> None:
    run, decoder = write_run(tmp_path / "run")
    export_model(run, tmp_path / "out", max_shard_size=200_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert all((tmp_path / "out" / file).stat().st_size < 250_000 for file in files)
    assert len(index["weight_map"]) == len(dict(decoder.named_parameters()))


_WITHOUT_XLSTM_PACKAGE = """
import importlib.util, sys
import torch

absent = ("xlstm", "mlstm_kernels")
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in absent else find_spec(name, package)
)
for name in absent:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError

from transformers import AutoModelForCausalLM
from transformers.models.xlstm import modeling_xlstm

assert not modeling_xlstm.external_xlstm
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = torch.load(sys.argv[2])
with torch.no_grad():
    print((model(input_ids=expected["tokens"]).logits - expected["logits"]).abs().max().item())
    continued = model.generate(expected["tokens"][:1, :9], max_new_tokens=4, do_sample=False)
assert continued.shape[1] > 9
"""


def test_the_class_without_the_xlstm_package_agrees(tmp_path: Path) -> None:
    run, decoder = write_run(tmp_path / "run", model_section(**CACHED))
    export_model(run, tmp_path / "out")
    tokens = random_tokens(2, 130)
    torch.save({"tokens": tokens, "logits": decoder.logits(tokens)[0]}, tmp_path / "expected.pt")
    found = subprocess.run(
        [sys.executable, "-c", _WITHOUT_XLSTM_PACKAGE, str(tmp_path / "out"), str(tmp_path / "expected.pt")],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) <= TOLERANCE


@pytest.mark.parametrize("hidden_size", [64, 128])
def test_transformers_writes_the_same_text(tmp_path: Path, hidden_size: int) -> None:
    run, decoder = write_run(tmp_path / "run", model_section(hidden_size=hidden_size))
    assert export_model(run, tmp_path / "out").cached_generation == (hidden_size == 128)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt in ("state", "a longer prompt that is read in one pass " * 3):
        inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt", return_token_type_ids=False)
        ids = exported.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs.input_ids.shape[1] :]
        (ours,) = generate(decoder, ByteTokenizer(), [prompt.encode()], 24, temperature=0)
        assert bytes(token for token in ids.tolist() if token < 256) == ours
        assert len(ours) > 0


@torch.no_grad()
def test_the_class_reads_padding(tmp_path: Path) -> None:
    """As the model card says: on the left it enters the state, on the right it changes nothing before it."""
    run, _ = write_run(tmp_path / "run", model_section(**CACHED))
    export_model(run, tmp_path / "out", check=False)
    assert "`xLSTMForCausalLM` does not read `attention_mask`" in (tmp_path / "out" / "README.md").read_text()
    model, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), random_tokens(1, 9).clamp(max=255)
    mark = torch.full((1, 3), 256)
    alone = model(tokens).logits
    left, right = torch.cat([mark, tokens], 1), torch.cat([tokens, mark], 1)
    padded = model(left, attention_mask=(left != 256).long()).logits[:, 3:]
    assert (padded - alone).abs().max() > 1e-2
    torch.testing.assert_close(model(right).logits[:, :9], alone, atol=1e-4, rtol=0)


def test_the_exported_model_trains(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run", model_section(**CACHED))
    export_model(run, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").train()
    tokens = random_tokens(2, 70)
    exported(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in exported.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_wrong_name_is_found_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = write_run(tmp_path / "run")
    keys = mlstm_form.KEYS["xlstm"]
    query, key = "projections.query_weight", "projections.key_weight"
    monkeypatch.setitem(mlstm_form.KEYS, "xlstm", keys | {query: keys[key], key: keys[query]})
    with pytest.raises(RuntimeError, match="logits differ from ours by"):
        export_model(run, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


BLOCK = model_section()["blocks"]["mlstm"]
TWO_HEADS = model_section({"num_heads": 2})["blocks"]["mlstm"]


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            model_section(layers=["mlstm", "half"], blocks={"mlstm": BLOCK, "half": {"channel": BLOCK["channel"]}}),
            r"xLSTMForCausalLM cannot hold layer 1 \(mixer none, channel swiglu\)$",
        ),
        (model_section(norm="layer"), "xLSTMForCausalLM has RMS norms, not model.norm=layer$"),
        (model_section(tie_embeddings=True), "xLSTMForCausalLM does not tie its embeddings$"),
        (
            model_section(norm_epsilon=1e-5),
            "xLSTMForCausalLM has one norm_eps for the whole model, but model needs 1e-05 and model.blocks.mlstm.mixer",
        ),
        (
            model_section(layers=["mlstm", "other"], blocks={"mlstm": BLOCK, "other": TWO_HEADS}),
            "one num_heads .* model.blocks.mlstm.mixer needs 4 and model.blocks.other.mixer needs 2$",
        ),
    ],
)
def test_what_the_class_cannot_hold_brings_its_code(model: dict, problem: str) -> None:
    config = tiny_config(model=model).model
    form, unfit = huggingface.choose_form(config)
    assert form.needs_code
    assert len(unfit) == len(huggingface.NATIVE_CLASSES)
    assert re.search(problem, unfit[0])
    for native, reason in zip(huggingface.NATIVE_CLASSES, unfit, strict=True):
        assert reason.startswith(native.architecture)


def test_a_mixer_without_any_form_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = write_run(tmp_path / "run", model_section(norm="layer"))
    module = custom.modeling_module
    monkeypatch.setattr(custom, "modeling_module", lambda family: None if family.name == "mlstm" else module(family))
    with pytest.raises(InputError, match="needs a modeling.py.* in pretrain/models/mlstm: xLSTM.*; Mamba2.*; Bamba"):
        export_model(run, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_an_output_that_holds_something_is_refused(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run")
    output = tmp_path / "out"
    output.mkdir()
    export_model(run, output)  # empty: taken
    before = {file: file.stat().st_mtime_ns for file in output.iterdir()}
    with pytest.raises(InputError, match="out is not empty"):
        export_model(run, output)
    assert {file: file.stat().st_mtime_ns for file in output.iterdir()} == before
    with pytest.raises(InputError, match="config.json is not a directory"):
        export_model(run, output / "config.json")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run")
    (shard,) = (run / "checkpoints" / "step-00000007").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(InputError, match="incomplete"):
        export_model(run, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
