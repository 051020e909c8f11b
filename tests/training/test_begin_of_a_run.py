"""A start that was killed before its first checkpoint goes on as it was begun, never silently with fresh weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import CheckpointReader, list_checkpoints
from pretrain.checkpoint.training import state_of_import
from pretrain.checkpoint.writer import write_checkpoint
from pretrain.config import parse_config
from tests.checkpoint.conftest import TensorPiece
from tests.runs import curve, raw_config, write_corpus

PROGRAMS = "tests.training.programs"


@pytest.fixture(scope="module")
def trained(worker_pools, tmp_path_factory) -> Path:
    """A run of four steps that saved steps 2 and 4."""
    directory = tmp_path_factory.mktemp("trained")
    write_corpus(directory / "corpus")
    worker_pools(1).run(PROGRAMS, "run_training", raw=run_config(directory, steps=4, checkpoint_every=2))
    return directory


def run_config(directory: Path, **train) -> dict:
    raw = raw_config(directory, train={"evaluate_every": 0, "checkpoint_every": 0, **train})
    return raw | {"schedule": {"type": "constant"}}


def imported_from(trained: Path, output: Path) -> Path:
    """The weights of a run as an import leaves them: of step 0, and nothing else."""
    config = parse_config(run_config(trained), "test")
    with CheckpointReader(list_checkpoints(trained / "run" / "checkpoints")[-1]) as reader:
        pieces = [TensorPiece(name, "weight", reader.read(name), reader.shape(name)) for name in reader.names()]
    return write_checkpoint(output, 0, pieces, state_of_import(config, {"architecture": "Other"}))


def first_weights(run: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(run / "checkpoints" / "step-00000000") as reader:
        return {name: reader.read(name) for name in reader.names()}


@pytest.mark.parametrize("resumed", ["auto", "the import again"])
def test_killed_while_imported_weights_are_saved_the_run_still_begins_with_them(
    resumed, worker_pools, trained, tmp_path
):
    imported = imported_from(trained, tmp_path / "imported")
    shutil.copytree(trained / "corpus", tmp_path / "corpus")
    raw = run_config(tmp_path, steps=1)
    worker_pools(1).run(PROGRAMS, "run_cut_in_a_save", raw=raw, resume=str(imported.parent))
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["tmp-step-00000000"], "the save was cut short"
    resume = "auto" if resumed == "auto" else str(imported.parent)
    worker_pools(1).run(PROGRAMS, "run_training", raw=raw, resume=resume)
    with CheckpointReader(imported) as reader:
        begun = first_weights(run)
        assert begun.keys() == set(reader.names())
        assert all(torch.equal(begun[name], reader.read(name)) for name in begun)


def test_killed_before_its_first_checkpoint_a_run_goes_on_from_the_one_it_began_with(worker_pools, trained, tmp_path):
    shutil.copytree(trained / "corpus", tmp_path / "corpus")
    began = str(trained / "run" / "checkpoints" / "step-00000002")
    raw = run_config(tmp_path, steps=4)
    worker_pools(1).run(PROGRAMS, "run_cut_in_a_save", raw=raw, resume=began)
    assert set(curve(tmp_path / "run")) == {3, 4} and not list_checkpoints(tmp_path / "run" / "checkpoints")
    worker_pools(1).run(PROGRAMS, "run_training", raw=raw)
    whole = curve(trained / "run")
    assert curve(tmp_path / "run") == {step: whole[step] for step in (3, 4)}
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["began_with"] == began and environment["earlier_starts"][0]["began_with"] == began


def test_what_a_run_began_with_is_named_where_it_is_gone(worker_pools, trained, tmp_path):
    imported = imported_from(trained, tmp_path / "imported")
    shutil.copytree(trained / "corpus", tmp_path / "corpus")
    raw = run_config(tmp_path, steps=1)
    worker_pools(1).run(PROGRAMS, "run_cut_in_a_save", raw=raw, resume=str(imported.parent))
    shutil.rmtree(imported)
    (said,) = worker_pools(1).run(PROGRAMS, "run_refused", raw=raw)
    assert "began with one that cannot be used any more" in said and str(imported) in said


def test_a_run_all_of_whose_checkpoints_are_broken_does_not_begin_again(worker_pools, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    for path in list_checkpoints(run / "checkpoints"):
        (path / "manifest.json").unlink()
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    (said,) = worker_pools(1).run(PROGRAMS, "run_refused", raw=run_config(tmp_path, steps=6))
    assert "holds no checkpoint that is whole (step-00000002, step-00000004)" in said
    assert "move them away to begin again" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert curve(run) == curve(trained / "run")
