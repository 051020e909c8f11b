"""Listing, choosing, retention, and what the commands report."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from pretrain.checkpoint import (
    CheckpointError,
    CheckpointReader,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    resolve_checkpoint,
    write_checkpoint,
)
from pretrain.checkpoint.commands import describe, describe_all, verify
from pretrain.errors import InputError


@pytest.fixture
def steps(run_checkpoints, tensors, whole_pieces, state):
    """Checkpoints of steps 50, 100, 150, 200, 250."""
    for step in (200, 50, 250, 100, 150):
        write_checkpoint(run_checkpoints, step, whole_pieces(tensors, step), {**state, "step": step})
    return run_checkpoints


def names(paths):
    return [path.name for path in paths]


def test_listing_is_in_order_of_step_and_complete_only(steps):
    (steps / "step-00000100" / "manifest.json").unlink()
    (steps / "step-00000300").mkdir()
    (steps / "step-12").mkdir()
    assert names(list_checkpoints(steps)) == [f"step-{step:08d}" for step in (50, 150, 200, 250)]
    assert list_checkpoints(steps / "absent") == []
    assert newest_checkpoint(steps / "absent") is None


def test_steps_beyond_eight_digits_sort_by_number(run_checkpoints):
    for step in (99_999_999, 100_000_000):
        write_checkpoint(run_checkpoints, step, [], {})
    assert newest_checkpoint(run_checkpoints).name == "step-100000000"


def test_a_renamed_checkpoint_is_not_taken_for_another_step(steps):
    (steps / "step-00000250").rename(steps / "step-00000900")
    assert newest_checkpoint(steps).name == "step-00000200"


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, None, [250]),
        (2, None, [200, 250]),
        (1, 100, [100, 200, 250]),
        (9, None, [50, 100, 150, 200, 250]),
    ],
)
def test_retention(steps, keep_last, keep_every, kept):
    before = list_checkpoints(steps)
    removed = prune_checkpoints(steps, keep_last, keep_every)
    assert names(list_checkpoints(steps)) == [f"step-{step:08d}" for step in kept]
    assert sorted(removed + list_checkpoints(steps)) == before
    assert sorted(names(steps.iterdir())) == names(list_checkpoints(steps))


def test_retention_counts_complete_checkpoints_only(steps):
    for step in (200, 250):
        (steps / f"step-{step:08d}" / "state.json").unlink()
    prune_checkpoints(steps, keep_last=1)
    assert names(list_checkpoints(steps)) == ["step-00000150"]
    assert (steps / "step-00000250").is_dir()


@pytest.mark.parametrize(("keep_last", "keep_every"), [(0, None), (1, 0)])
def test_retention_that_would_keep_nothing_is_refused(steps, keep_last, keep_every):
    with pytest.raises(InputError, match="keep_"):
        prune_checkpoints(steps, keep_last, keep_every)
    assert len(list_checkpoints(steps)) == 5


def test_resolve_takes_a_run_its_checkpoints_or_one_step(steps):
    newest = steps / "step-00000250"
    assert resolve_checkpoint(steps.parent) == newest
    assert resolve_checkpoint(steps) == newest
    assert resolve_checkpoint(steps / "step-00000100") == steps / "step-00000100"
    shutil.copytree(newest, steps.parent / "best")
    assert resolve_checkpoint(steps.parent / "best") == steps.parent / "best"


def test_resolve_explains_what_it_expected(steps, tmp_path):
    with pytest.raises(InputError, match="is not a directory"):
        resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path)
    for path in list_checkpoints(steps):
        (path / "manifest.json").unlink()
    with pytest.raises(InputError, match="only incomplete checkpoints"):
        resolve_checkpoint(steps.parent)
    with pytest.raises(InputError, match="manifest.json is missing"):
        resolve_checkpoint(steps / "step-00000100")


def test_describe_counts_what_is_there(steps):
    report = describe(steps.parent)
    checkpoint = steps / "step-00000250"
    files = [path for path in checkpoint.iterdir() if path.name != "manifest.json"]
    assert report["step"] == 250
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    assert report["tensors"] == 3
    assert report["parameters"] == 48 + 6 + 1
    assert report["kinds"] == {"weight": 3, "exp_avg": 3, "exp_avg_sq": 3, "state": 3}
    assert report["config"] == {"model.family": "mlstm", "model.hidden_size": 8, "seed": 3}
    assert report["saved_at"].endswith("+00:00")
    assert verify(steps.parent) == report


def test_describe_all_shows_broken_ones_with_their_problem(steps):
    (steps / "step-00000150" / "state.json").unlink()
    rows = describe_all(steps.parent)
    assert [row["step"] for row in rows] == [50, 100, 150, 200, 250]
    assert [row["step"] for row in rows if row["problem"]] == [150]
    assert "state.json is missing" in rows[2]["problem"]
    assert describe_all(steps) == rows
    assert [row["step"] for row in describe_all(steps / "step-00000200")] == [200]


def test_verify_names_the_damaged_file(steps):
    shard = steps / "step-00000250" / "shard-00000-0000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x99")
    with pytest.raises(InputError, match="step-00000250/shard-00000-0000.safetensors"):
        verify(steps.parent)


@pytest.mark.parametrize("file", ["manifest.json", "shard-00000-0000.safetensors"])
def test_verify_of_a_run_tells_of_its_newest_though_an_earlier_one_is_whole(steps, file):
    (steps / "step-00000250" / file).unlink()
    assert resolve_checkpoint(steps.parent).name == "step-00000200"
    for path in (steps.parent, steps, steps / "step-00000250"):
        with pytest.raises(InputError, match=rf"step-00000250/{file} is missing"):
            verify(path)
    assert verify(steps / "step-00000200")["step"] == 200


def test_listing_says_where_there_is_nothing_to_list(steps, tmp_path):
    shutil.copytree(steps / "step-00000050", tmp_path / "other" / "checkpoints" / "tmp-step-00000050")
    with pytest.raises(InputError, match="other holds no checkpoint yet; a save that did not finish is none"):
        describe_all(tmp_path / "other")
    (steps / "step-00000250" / "manifest.json").unlink()
    with pytest.raises(InputError, match="manifest.json is missing"):
        describe_all(steps / "step-00000250")


def test_saving_the_same_point_again_leaves_and_reports_it(checkpoint, run_checkpoints, tensors, caplog, state):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    def never_drawn():
        raise AssertionError("nothing is to be gathered for a checkpoint that exists")
        yield

    assert write_checkpoint(run_checkpoints, 100, never_drawn(), state) == checkpoint
    assert "already complete" in caplog.text
    resumed = write_checkpoint(run_checkpoints, 100, never_drawn(), {"layout": "another"}, resumed_from=100)
    assert resumed == checkpoint
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_another_history_of_the_same_step_is_refused(checkpoint, run_checkpoints, tensors, whole_pieces):
    with pytest.raises(CheckpointError, match="another history"):
        write_checkpoint(run_checkpoints, 100, whole_pieces(tensors, 3.0), {"seed": 4}, resumed_from=50)
    assert torch.equal(CheckpointReader(checkpoint).read("embedding.weight"), tensors["embedding.weight"])
    assert names(run_checkpoints.iterdir()) == ["step-00000100"]


def cut_shard(checkpoint):
    shard = next(checkpoint.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_bit(checkpoint):
    shard = next(checkpoint.glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_shard, flip_bit])
def test_a_broken_one_of_the_same_step_is_moved_aside_and_replaced(
    checkpoint, run_checkpoints, tensors, damage, whole_pieces, state
):
    damage(checkpoint)
    assert write_checkpoint(run_checkpoints, 100, whole_pieces(tensors), state) == checkpoint
    CheckpointReader(checkpoint).verify()
    assert sorted(names(run_checkpoints.iterdir())) == ["broken-step-00000100-0", "step-00000100"]


def test_listing_and_describing_need_no_torch(steps):
    program = (
        "import sys; sys.modules['torch'] = None; sys.modules['safetensors'] = None\n"
        "from pathlib import Path\n"
        "from pretrain.checkpoint import newest_checkpoint\n"
        "from pretrain.checkpoint.commands import describe\n"
        "print(describe(newest_checkpoint(Path(sys.argv[1])))['step'])\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(steps)], capture_output=True, text=True)
    assert result.stdout == "250\n", result.stderr
