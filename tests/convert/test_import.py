"""Import: models of transformers' own classes become checkpoints that compute the same, train, and export again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from pretrain.checkpoint import CheckpointReader, resolve_checkpoint
from pretrain.checkpoint.commands import describe
from pretrain.cli import app
from pretrain.config import load_config
from pretrain.convert import export_model, import_model
from pretrain.convert import importing as module
from pretrain.errors import CheckError, InputError
from pretrain.models.loading import load_decoder
from tests.convert.checkpoints import random_tokens
from tests.convert.native_models import CLASSES, add_tokenizer, change_config, random_model, tensors_in
from tests.runs import curve, write_corpus
from tests.training.programs import run_training
from tests.workers import WorkerPool

# float32 on both sides, sums in another order.
TOLERANCE = 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_it_computes_the_same_and_exports_the_same(
    name: str, saved: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    directory, output = saved(name), tmp_path / "imported"
    report = import_model(directory, output, base=base, max_shard_bytes=20_000)
    assert report.comparison.largest_difference <= report.comparison.tolerance == TOLERANCE
    assert {entry.name for entry in output.iterdir()} == {"config.yaml", "step-00000000"}

    found = describe(output)
    assert (found["step"], found["kinds"]) == (0, {"weight": found["tensors"]})
    assert found["shards"] > 1 and found["parameters"] == report.parameters
    config = load_config(output / "config.yaml")
    assert config.run.directory == str(tmp_path / "run")
    with CheckpointReader(resolve_checkpoint(output)) as reader:
        reader.verify()
        assert reader.state["config"] == config.model_dump(mode="json")

    tokens = random_tokens(2, 70)
    ours, _ = load_decoder(output).decoder.logits(tokens)
    assert ours.std() > 0.5
    cache = {"use_cache": False} if name == "xlstm" else {}
    torch.testing.assert_close(ours, random_model(name)(input_ids=tokens, **cache).logits, atol=TOLERANCE, rtol=0)

    assert export_model(output, tmp_path / "exported").architecture == report.architecture
    before, after = tensors_in(directory), tensors_in(tmp_path / "exported")
    assert before.keys() == after.keys()
    if "multipliers" not in name:
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_weights_in_one_file_become_float32_exactly(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    random_model("bamba", dtype).save_pretrained(tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").exists()
    import_model(tmp_path / "hf", tmp_path / "imported", base=base)
    export_model(tmp_path / "imported", tmp_path / "exported")
    before, after = tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "exported")
    assert {tensor.dtype for tensor in before.values()} == {dtype}
    assert all(torch.equal(before[key].float(), after[key]) for key in before)


def test_two_processes_go_on_from_the_same_loss(
    saved: Callable[[str], Path], base: Path, tmp_path: Path, worker_pools: Callable[[int], WorkerPool]
) -> None:
    write_corpus(tmp_path / "corpus")
    import_model(saved("nemotron"), tmp_path / "imported", base=base, check=False)
    raw = yaml.safe_load((tmp_path / "imported" / "config.yaml").read_text())
    raw["train"] |= {"steps": 2, "evaluate_every": 0, "checkpoint_every": 0}
    raw["schedule"] |= {"warmup_steps": 1}
    alone = raw | {"run": {"directory": str(tmp_path / "alone")}, "parallel": {"zero": 0}}
    split = raw | {"run": {"directory": str(tmp_path / "split")}, "parallel": {"tensor": 2, "zero": 1}}
    start = str(tmp_path / "imported")
    assert run_training(alone, start) == (2, False)
    pool = worker_pools(2)
    assert pool.run("tests.training.programs", "run_training", raw=split, resume=start) == [(2, False)] * 2
    expected, found = curve(tmp_path / "alone"), curve(tmp_path / "split")
    assert set(found) == {1, 2}
    for step in found:
        assert found[step] == pytest.approx(expected[step], rel=1e-5)

    # A run that was killed before its first checkpoint begins again with the imported weights, not with fresh ones.
    shutil.rmtree(tmp_path / "split" / "checkpoints" / "step-00000002")
    with CheckpointReader(tmp_path / "split" / "checkpoints" / "step-00000000") as reader:
        with CheckpointReader(resolve_checkpoint(tmp_path / "imported")) as imported:
            assert all(torch.equal(reader.read(name), imported.read(name)) for name in imported.names())
    (tmp_path / "split" / "metrics.jsonl").unlink()
    assert pool.run("tests.training.programs", "run_training", raw=split) == [(2, False)] * 2
    assert curve(tmp_path / "split") == found


@pytest.mark.parametrize("marks", [{"eos_token": {"content": "<|end|>"}}, {"bos_token": "<|end|>"}, {}])
def test_what_is_still_to_choose_stands_in_the_configuration(
    copied: Callable[[str], Path], tmp_path: Path, marks: dict[str, Any]
) -> None:
    directory, output = copied("mamba2"), tmp_path / "imported"
    add_tokenizer(directory, marks)
    change_config(directory, eos_token_id=256 if not marks else None)
    report = import_model(directory, output, check=False)
    assert not report.chosen and "???" in str(report) and "<|end|> between documents" in str(report)
    with pytest.raises(InputError, match=r"data.sequence_length, data.source, .* must still be chosen"):
        load_config(output / "config.yaml")
    chosen = ["data.source.type=standard_library", "data.sequence_length=64", "optimizer.learning_rate=1e-4"]
    chosen += ["train.steps=9", "train.global_batch_size=2", "train.micro_batch_size=1"]
    config = load_config(output / "config.yaml", chosen)
    assert (config.data.tokenizer.path, config.data.tokenizer.boundary_token) == (
        str(output / "tokenizer.json"),
        "<|end|>",
    )
    assert (output / "tokenizer.json").read_text() == (directory / "tokenizer.json").read_text()
    assert load_decoder(output).config.model == config.model


def test_files_of_before_the_class_was_in_transformers(
    saved: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "hf"
    shutil.copytree(saved("xlstm"), directory)
    kernels = {"chunkwise_kernel": "chunkwise--triton_xl_chunk", "step_kernel": "triton", "mode": "train"}
    change_config(
        directory, **kernels, hidden_size=..., num_hidden_layers=..., force_bos_token_insert=True, head_dim=512
    )
    report = import_model(directory, tmp_path / "imported", base=base)
    assert "force_bos_token_insert=true is not read by xLSTMForCausalLM" in str(report)
    shutil.copytree(saved("nemotron"), tmp_path / "nemotron")
    change_config(tmp_path / "nemotron", layers_block_type=..., hybrid_override_pattern="M-*-", num_hidden_layers=4)
    import_model(tmp_path / "nemotron", tmp_path / "pattern", base=base)


def test_snapshots_of_the_hub_are_links(saved: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    shutil.copytree(saved("mamba2"), blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    import_model(snapshot, tmp_path / "imported", base=base, check=False)
    shutil.move(blobs, tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link to .*elsewhere.*copy the file itself"):
        import_model(snapshot, tmp_path / "refused", base=base, check=False)


def test_a_tied_head_that_was_written_too(copied: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    directory = copied("mamba2, tied")
    embedding = tensors_in(directory)["backbone.embeddings.weight"]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"lm_head.weight": embedding.clone()}, directory / "head.safetensors")
    import_model(directory, tmp_path / "imported", base=base)
    save_file({"lm_head.weight": embedding + 1e-3}, directory / "head.safetensors")
    with pytest.raises(InputError, match="lm_head.weight is not the embedding, though"):
        import_model(directory, tmp_path / "refused", base=base)


def test_nothing_is_left_where_logits_differ(
    saved: Callable[[str], Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.IncomingWeights.__iter__

    def wrong(self: module.IncomingWeights) -> Any:
        for piece in original(self):
            if piece.name == "layers.0.mixer.skip":
                piece.tensor.add_(0.01)
            yield piece

    monkeypatch.setattr(module.IncomingWeights, "__iter__", wrong)
    with pytest.raises(CheckError, match="logits differ from those of Mamba2ForCausalLM by .*; nothing was left"):
        import_model(saved("mamba2"), tmp_path / "imported", base=base)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base.yaml"]
    import_model(saved("mamba2"), tmp_path / "imported", base=base, check=False)


def test_the_command(saved: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    arguments = ["import", str(saved("mamba2")), str(tmp_path / "imported"), "--config", str(base), "--no-check"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "logits were not compared" in result.output
    assert f"pretrain train {tmp_path}/imported/config.yaml --resume {tmp_path}/imported" in result.output
    assert isinstance(CliRunner().invoke(app, arguments).exception, InputError)
