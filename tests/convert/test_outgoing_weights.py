"""Exports in any dtype and in any number of files, within a bounded memory, and what a full disk leaves."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pretrain.checkpoint import TensorPiece, write_checkpoint
from pretrain.convert import export_model
from pretrain.convert.outgoing_weights import parse_size
from pretrain.convert.weight_files import WeightFiles
from pretrain.errors import CheckError, InputError
from pretrain.models.loading import parameter_shapes
from tests.configurations import tiny_config
from tests.convert.checkpoints import model_section, pieces_of, random_decoder, random_tokens, write_run
from tests.convert.native_models import tensors_in
from tests.convert.test_custom_export import code_cache, mix_of_all_mixers
from tests.convert.test_native_classes import MAMBA2, SWIGLU, mix
from tests.runs import environment, pretrain_command, started

__all__ = ["code_cache"]

# Each layer is one large matrix and some small tensors.
CHANNELS = {"type": "swiglu", "intermediate_size": 512}


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("2GiB", 2**31), ("500 mb", 500_000_000), ("1.5KiB", 1536), ("7", 7), (12, 12)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1", "0", "1e9", "5 GB 2", "0.1B"])
def test_what_is_no_size_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max-shard-size must be a size such as 5GB"):
        export_model(tmp_path, tmp_path / "out", max_shard_size=text)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--dtype must be one of float32, bfloat16, but is 'float16'"):
        export_model(tmp_path, tmp_path / "out", dtype="float16")


NATIVE = {
    "xlstm": model_section(),
    "mamba2": mix((MAMBA2, None), (MAMBA2, None)),
}
BAMBA = mix((MAMBA2, SWIGLU), ({"type": "attention", "num_heads": 4, "rotary_fraction": 0.5}, SWIGLU))


@pytest.mark.parametrize("name", NATIVE)
def test_bfloat16_of_native_classes(tmp_path: Path, name: str) -> None:
    """The run's own dtype, compared with our weights rounded likewise; float32 stays only where a class loads it so."""
    run, _ = write_run(tmp_path / "run", NATIVE[name], train={"precision": "bfloat16"})
    report = export_model(run, tmp_path / "out", max_shard_size="60KB")
    assert (report.dtype, report.needs_code) == ("bfloat16", False)
    assert report.files > 1 and report.comparison.largest_difference <= 1e-4
    written = tensors_in(tmp_path / "out")
    float32 = {name: tensor.numel() for name, tensor in written.items() if tensor.dtype == torch.float32}
    assert {tensor.dtype for name, tensor in written.items() if name not in float32} == {torch.bfloat16}
    assert report.kept_float32 == sum(float32.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * report.parameters + 2 * report.kept_float32
    loaded, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), random_tokens(1, 130)
    assert loaded(tokens).logits.isfinite().all()
    if name == "xlstm":
        assert (loaded.dtype, report.comparison.in_bfloat16) == (torch.float32, None)
        assert {name.split(".")[-1] for name in float32} == {"weight", "bias"}
        assert all("norm" in name or "gate_preact.bias" in name for name in float32)
        assert "config.json says float32: xLSTMForCausalLM computes in nothing else" in str(report)
        with pytest.raises(RuntimeError, match="same dtype"):
            loaded.bfloat16()(tokens)
    else:
        assert not float32 and f"since {report.architecture} loads norms" in str(report)
        assert loaded.dtype == torch.bfloat16 and 0 < report.comparison.in_bfloat16 < 0.1


def test_bfloat16_with_code_of_its_own(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run", model_section(norm="layer"))
    report = export_model(run, tmp_path / "out", dtype="bfloat16")
    assert report.needs_code and 0 < report.comparison.in_bfloat16 < 0.1
    assert f"{report.kept_float32:,} of them, which training never rounds, are float32" in str(report)


def test_what_mixers_declare_stays_float32(tmp_path: Path) -> None:
    run, decoder = write_run(tmp_path / "run", mix_of_all_mixers())
    report = export_model(run, tmp_path / "out", dtype="bfloat16", check=False)
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.dtype == torch.bfloat16
    written, ours = tensors_in(tmp_path / "out"), dict(decoder.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokens = random_tokens(2, 12)
    found, expected = loaded(tokens).logits, decoder.logits(tokens)[0]
    assert (found - expected).norm() <= 0.1 * expected.norm()
    for module in loaded.modules():
        assert all(hasattr(module, name) for name in getattr(module, "float32_parameters", ())), type(module)
    float32 = {name for name, tensor in written.items() if tensor.dtype == torch.float32}
    assert {name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.float32} == float32
    assert written.keys() == ours.keys()
    assert report.kept_float32 == sum(ours[name].numel() for name in float32) > 0
    for tensor_name, tensor in written.items():
        assert torch.equal(tensor, ours[tensor_name].to(tensor.dtype)), tensor_name
    kept = {name.rsplit(".", 1)[-1] for name in float32}
    assert {"weight", "norm_weight", "log_decay_rate", "recurrent_weight", "forget_gate_bias", "peephole"} < kept
    # Norms, routers and per-channel vectors; no matrix that is multiplied in bfloat16.
    assert not any(name.endswith(("down.weight", "output.weight", "query_weight", "input_map")) for name in float32)
    # Saved again by transformers, it is the same.
    loaded.save_pretrained(tmp_path / "again")
    for tensor_name, tensor in tensors_in(tmp_path / "again").items():
        assert tensor.dtype == written[tensor_name].dtype and torch.equal(tensor, written[tensor_name]), tensor_name


def test_float32_of_a_bfloat16_run(tmp_path: Path) -> None:
    run, decoder = write_run(tmp_path / "run", train={"precision": "bfloat16"})
    report = export_model(run, tmp_path / "out", dtype="float32")
    assert (report.dtype, report.kept_float32, report.comparison.in_bfloat16) == ("float32", 0, None)
    assert sorted(map(torch.sum, tensors_in(tmp_path / "out").values())) == sorted(map(torch.sum, decoder.parameters()))


def test_bfloat16_that_is_too_coarse_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = write_run(tmp_path / "run", NATIVE["mamba2"])
    for module in ("comparison", "huggingface"):
        monkeypatch.setattr(f"pretrain.convert.{module}.BFLOAT16_TOLERANCE", 1e-6)
    with pytest.raises(CheckError, match="agree with ours in float32, but differ .* export it with --dtype float32"):
        export_model(run, tmp_path / "out", dtype="bfloat16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_tensors_come_whole_from_the_pieces_of_any_layout(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read some rows at a time, split over ranks, joined and unsqueezed for the class; without loading any model."""
    monkeypatch.setattr("pretrain.convert.outgoing_weights._BYTES_READ_AT_ONCE", 700)
    monkeypatch.setattr("pretrain.convert.huggingface.load_decoder", None)
    config = tiny_config(model=BAMBA)
    decoder = random_decoder(config)
    state = {"config": config.model_dump(mode="json")}
    write_checkpoint(tmp_path / "run" / "checkpoints", 7, pieces_of(decoder, ranks), state, max_shard_bytes=50_000)
    report = export_model(tmp_path / "run", tmp_path / "out", max_shard_size=60_000, check=False)
    assert report.comparison is None and "logits were not compared" in str(report)
    model, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), random_tokens(2, 33)
    torch.testing.assert_close(model(tokens).logits, decoder.logits(tokens)[0], atol=1e-4, rtol=0)
    files = WeightFiles(tmp_path / "out")
    assert not files.problems and files.elements == report.parameters
    sizes = {file: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert len(sizes) == report.files > 2
    largest = max(tensor.nbytes for tensor in tensors_in(tmp_path / "out").values())
    assert all(size <= max(60_000, largest) + 5_000 for size in sizes.values())


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = tiny_config(model=model_section())
    pieces = [piece for piece in pieces_of(random_decoder(config)) if "layers.1.mixer.output" not in piece.name]
    write_checkpoint(tmp_path / "checkpoints", 7, pieces, {"config": config.model_dump(mode="json")})
    with pytest.raises(InputError, match="another model: it lacks 1 tensors"):
        export_model(tmp_path, tmp_path / "out", check=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoints"]


def test_a_full_disk_is_said_in_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """The operating system refuses to let any file grow beyond a limit."""
    run, _ = write_run(tmp_path / "run")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit, problem in ((300_000, "model.safetensors"), (900, "tokenizer.json")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(InputError, match=f"^{problem} cannot be written in .*File too large.*; make room"):
                export_model(run, tmp_path / "out", check=False)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _large_checkpoint(directory: Path, layers: int, **model: Any) -> int:
    """A checkpoint of random weights that are drawn one after the other; bytes of them."""
    section = model_section(layers=["channel"], blocks={"channel": {"channel": CHANNELS}}, num_layers=layers, **model)
    config = tiny_config(model=section)
    shapes = parameter_shapes(config)

    def pieces() -> Iterator[TensorPiece]:
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            yield TensorPiece(name, "weight", torch.randn(shape, generator=generator), shape)

    state = {"config": config.model_dump(mode="json")}
    write_checkpoint(directory / "checkpoints", 7, pieces(), state, max_shard_bytes=16_000_000)
    return sum(4 * torch.Size(shape).numel() for shape in shapes.values())


def _peak_of_export(run: Path, output: Path, max_shard_size: str) -> int:
    """Bytes of resident memory that an export adds at most."""
    gc.collect()
    # What was freed earlier is given back, so that the export cannot hide in it.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    status = lambda key: int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024  # noqa: E731
    before = status("VmRSS")
    export_model(run, output, max_shard_size=max_shard_size, check=False)
    return status("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks cannot be measured anew here")
def test_memory_is_that_of_one_shard(tmp_path: Path) -> None:
    """63 MB of weights, of which no more than a shard of 2 MB and a tensor of 1.5 MB are ever held."""
    size = _large_checkpoint(tmp_path / "small", 1) and _large_checkpoint(tmp_path / "run", 40, hidden_size=256)
    export_model(tmp_path / "small", tmp_path / "warm", check=False)
    sharded = _peak_of_export(tmp_path / "run", tmp_path / "sharded", "2MB")
    whole = _peak_of_export(tmp_path / "run", tmp_path / "whole", "1GB")
    assert size > 60_000_000
    assert sharded < 16_000_000 < size < whole
    files = list((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(files) >= 30 and max(file.stat().st_size for file in files) <= 2_000_000
    assert json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())["metadata"] == {
        "total_size": size
    }


@pytest.mark.slow
def test_memory_is_that_of_one_shard_at_true_size(tmp_path: Path) -> None:
    """2.5 GB of weights in a process of its own, beside one that exports next to nothing."""
    size = _large_checkpoint(tmp_path / "large", 400, hidden_size=1024)
    _large_checkpoint(tmp_path / "small", 1)
    peaks = {}
    for name in ("small", "large"):
        command = pretrain_command(
            "export", tmp_path / name, tmp_path / f"{name}-out", "--no-check", "--max-shard-size", "100MB"
        )
        with started(command, env=environment(), stdout=sys.stderr) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks[name] = usage.ru_maxrss * 1024
    assert size > 2_500_000_000
    assert peaks["large"] - peaks["small"] < 150_000_000
    exported = WeightFiles(tmp_path / "large-out")
    assert 4 * exported.elements == size and not exported.problems
