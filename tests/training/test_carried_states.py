"""Runs whose rows go on from step to step: resumed bit for bit, in other layouts, over epochs and skipped steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset import open_data
from pretrain.checkpoint import CheckpointReader, list_checkpoints
from pretrain.config import parse_config
from tests.runs import assert_same_curve, curve, raw_config, write_corpus

PROGRAMS = "tests.training.programs"
STEPS = 7

LAYOUTS = {
    "single": (1, {"zero": 0}),
    "tensor2": (2, {"tensor": 2, "sequence": True, "zero": 1}),
    "pipeline2": (2, {"pipeline": 2, "zero": 0}),
    "data2": (2, {"zero": 1}),
}


def model() -> dict[str, Any]:
    """A mixer with states of several kinds, and a window of keys that fills up only in the third step."""
    blocks = {
        "mamba": {"mixer": {"type": "mamba2", "head_size": 16, "state_size": 8}},
        # Two tensor-parallel ranks hold one key head, each whole.
        "window": {"mixer": {"type": "attention", "num_heads": 2, "num_key_value_heads": 1, "sliding_window": 80}},
    }
    return {
        "vocab_size": 264,
        "hidden_size": 32,
        "num_layers": 2,
        "layers": ["mamba", "window"],
        "blocks": blocks,
        "output_logit_soft_cap": None,
    }


def section(directory: Path, layout: str = "single", **train: Any) -> dict[str, Any]:
    raw = raw_config(directory, model=model(), parallel=LAYOUTS[layout][1])
    # The schedule must not know that the run is cut.
    raw["schedule"] = {"type": "constant"}
    raw["data"]["held_out_fraction"] = 0.4
    settings = {"steps": STEPS, "checkpoint_every": 1, "evaluate_every": 3, "carry_state": True}
    raw["train"] = raw["train"] | settings | train
    return raw


def corpus(directory: Path) -> Path:
    """So little text that an epoch ends within a run."""
    for path in write_corpus(directory / "corpus", documents=8).iterdir():
        path.write_text(path.read_text()[:130])
    return directory


@pytest.fixture(scope="module")
def train(worker_pools):
    def run(raw: dict[str, Any], layout: str = "single", program: str = "run_training", **arguments: Any) -> list[Any]:
        return worker_pools(LAYOUTS[layout][0]).run(PROGRAMS, program, raw=raw, **arguments)

    return run


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory) -> Path:
    directory = corpus(tmp_path_factory.mktemp("unbroken"))
    raw = section(directory)
    config = parse_config(raw, "test")
    data = open_data(config.data, config.train.seed, config.train.global_batch_size)
    assert 3 <= data.train.samples_per_epoch // 4 < STEPS, "an epoch ends within the run"
    train(raw)
    return directory


def cut_after(source: Path, directory: Path, step: int) -> Path:
    """A copy of a run as if it had been killed right after ``step`` was saved."""
    shutil.copytree(source, directory, dirs_exist_ok=True)
    for path in list_checkpoints(directory / "run" / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return directory


def states_at(directory: Path, step: int) -> dict[str, torch.Tensor]:
    with CheckpointReader(directory / "run" / "checkpoints" / f"step-{step:08}") as reader:
        return {name: reader.read(name, "state") for name in reader.names("state")}


def test_a_resumed_run_goes_on_bit_for_bit(train, unbroken, tmp_path) -> None:
    directory = cut_after(unbroken, tmp_path, 2)
    assert train(section(directory)) == [(STEPS, False)]
    assert curve(directory / "run") == curve(unbroken / "run")
    ended, expected = states_at(directory, STEPS), states_at(unbroken, STEPS)
    assert ended.keys() == expected.keys()
    assert all(torch.equal(ended[name], tensor) for name, tensor in expected.items())


def test_states_are_kept_by_layer_name_and_row(unbroken) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in states_at(unbroken, 2).items()}
    # Four rows; after two steps of 32 tokens the window of 79 earlier ones is not full.
    assert shapes == {
        "layers.0.mixer.matrix": [4, 4, 16, 8],
        "layers.0.mixer.value_convolution": [4, 3, 64],
        "layers.0.mixer.key_convolution": [4, 3, 8],
        "layers.0.mixer.query_convolution": [4, 3, 8],
        "layers.1.mixer.key": [4, 64, 1, 16],
        "layers.1.mixer.value": [4, 64, 1, 16],
        "layers.1.mixer.position": [4],
    }
    assert states_at(unbroken, 4)["layers.1.mixer.key"].shape[1] == 79


def test_the_layout_changes_at_every_resume(train, unbroken, tmp_path) -> None:
    corpus(tmp_path)
    for layout, steps, micro_batch_size in (("tensor2", 2, 2), ("data2", 4, 1), ("pipeline2", STEPS, 1)):
        train(section(tmp_path, layout, steps=steps, micro_batch_size=micro_batch_size), layout)
    assert_same_curve(curve(tmp_path / "run"), curve(unbroken / "run"))
    for name, expected in states_at(unbroken, STEPS).items():
        torch.testing.assert_close(states_at(tmp_path, STEPS)[name], expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_and_recomputation_resume_bit_for_bit(train, tmp_path) -> None:
    settings = {"precision": "bfloat16", "recompute": "block", "steps": 4}
    train(section(corpus(tmp_path / "whole"), **settings))
    assert all(tensor.dtype == torch.float32 for tensor in states_at(tmp_path / "whole", 2).values())
    directory = cut_after(tmp_path / "whole", tmp_path / "cut", 2)
    train(section(directory, **settings))
    assert curve(directory / "run") == curve(tmp_path / "whole" / "run")


def test_a_skipped_step_leaves_the_states_of_before_it(train, tmp_path) -> None:
    raw = section(corpus(tmp_path), "data2", steps=4, micro_batch_size=1)
    raw["model"]["layers"] = ["mlstm", "window"]
    raw["model"]["blocks"]["mlstm"] = {"mixer": {"type": "mlstm", "num_heads": 2}}
    broken = {"broken_steps": [3], "broken_rank": 1}
    assert train(raw, "data2", "run_with_broken_gradients", **broken) == [None, None]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [False, False, True, False]
    before, after, later = (states_at(tmp_path, step) for step in (2, 3, 4))
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(not torch.equal(later[name], tensor) for name, tensor in after.items() if "stabilizer" in name)


def test_states_that_are_not_finite_are_not_gone_on_with(train, tmp_path) -> None:
    raw = section(corpus(tmp_path), "data2", steps=4, micro_batch_size=1)
    train(raw, "data2", "run_with_broken_states", broken_step=3, broken_rank=1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any(line["skipped"] for line in lines)
    before, after, later = (states_at(tmp_path, step) for step in (2, 3, 4))
    # Those of the other rank too: a row's state does not depend on which rank reads it.
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(tensor.isfinite().all() for tensor in later.values())
    assert not torch.equal(later["layers.0.mixer.matrix"], after["layers.0.mixer.matrix"])


def test_a_resume_that_would_read_other_samples_is_refused(train, unbroken, tmp_path) -> None:
    directory = cut_after(unbroken, tmp_path, 2)
    before = curve(directory / "run")
    (off,) = train(section(directory, carry_state=False), program="run_refused")
    assert "train.carry_state=true, but the configuration says false" in off and "set train.carry_state back" in off
    (wider,) = train(section(directory, global_batch_size=8), program="run_refused")
    assert "train.global_batch_size=4, but the configuration says 8" in wider
    checkpoint = list_checkpoints(directory / "run" / "checkpoints")[-1]
    elsewhere = section(corpus(tmp_path / "second"), carry_state=False)
    assert train(elsewhere, program="run_refused", resume=str(checkpoint)) == [off]
    assert curve(directory / "run") == before


def test_a_checkpoint_from_before_the_option_goes_on_without_it(train, tmp_path) -> None:
    corpus(tmp_path)
    train(section(tmp_path, steps=2, carry_state=False))
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    rewrite_state(checkpoint, without_option)
    (refused,) = train(section(tmp_path, steps=3), program="run_refused")
    assert "train.carry_state=false, but the configuration says true" in refused
    assert train(section(tmp_path, steps=3, carry_state=False)) == [(3, False)]


def without_option(state: dict[str, Any]) -> None:
    del state["config"]["train"]["carry_state"]


def rewrite_state(checkpoint: Path, change: Any) -> None:
    """Changes ``state.json`` and what the manifest says of it."""
    import hashlib

    from pretrain.checkpoint.format import manifest_checksum

    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    text = json.dumps(state, sort_keys=True, indent=1) + "\n"
    (checkpoint / "state.json").write_text(text)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["state"] |= {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
