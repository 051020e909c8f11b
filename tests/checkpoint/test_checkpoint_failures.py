"""A save that fails or is killed leaves the earlier checkpoint the newest, and no rank waits for ever."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import (
    CheckpointError,
    CheckpointReader,
    TensorPiece,
    list_checkpoints,
    newest_checkpoint,
    shards,
    write_checkpoint,
    writer,
)

PROGRAM = Path(__file__).with_name("saving_process.py")
ROOT = Path(__file__).parents[2]
NUM_PHASES_BEFORE_RENAME = 9
NUM_PHASES = 10


def start(*arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    try:
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return output


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("module", "name", "failure", "message"),
    [
        (writer.Path, "mkdir", read_only, "Read-only file system"),
        (shards, "save_file", no_space, "No space left on device"),
        (shards.os, "fsync", no_space, "No space left on device"),
        (writer, "write_durably", no_space, "No space left on device"),
        (writer, "fsync_directory", no_space, "No space left on device"),
        (writer.os, "rename", no_space, "No space left on device"),
    ],
)
def test_a_failure_names_itself_and_leaves_only_the_earlier_checkpoint(
    checkpoint, run_checkpoints, tensors, whole_pieces, monkeypatch, module, name, failure, message
):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failure)
        with pytest.raises(CheckpointError, match=f"step 200 could not be saved in .*rank 0: .*{message}"):
            write_checkpoint(run_checkpoints, 200, whole_pieces(tensors, 2.0), {})
    assert list(run_checkpoints.iterdir()) == [checkpoint]
    CheckpointReader(checkpoint).verify()
    write_checkpoint(run_checkpoints, 200, whole_pieces(tensors, 2.0), {})
    assert len(list_checkpoints(run_checkpoints)) == 2


def test_everything_is_on_disk_before_the_rename_and_the_rename_before_the_end(
    run_checkpoints, tensors, whole_pieces, monkeypatch
):
    events = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor):
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def recording_rename(source, target):
        events.append(f"rename {source.name} {target.name}")
        rename(source, target)

    run_checkpoints.mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    write_checkpoint(run_checkpoints, 7, whole_pieces(tensors), {}, max_shard_bytes=500)
    assert events == [
        "fsync shard-00000-0000.safetensors",
        "fsync shard-00000-0001.safetensors",
        "fsync state.json",
        "fsync manifest.json",
        "fsync tmp-step-00000007",
        "rename tmp-step-00000007 step-00000007",
        "fsync checkpoints",
    ]


def test_pieces_are_drawn_to_the_end_after_a_failure(run_checkpoints, monkeypatch):
    """Other ranks wait in the collectives behind the later pieces."""
    drawn = []

    def pieces():
        for index in range(5):
            drawn.append(index)
            yield TensorPiece(f"w{index}", "weight", torch.ones(4), (4,))

    monkeypatch.setattr(shards, "save_file", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(run_checkpoints, 1, pieces(), {}, max_shard_bytes=16)
    assert drawn == [0, 1, 2, 3, 4]


def test_an_error_while_gathering_is_reported_as_such(checkpoint, run_checkpoints):
    def pieces():
        yield TensorPiece("w", "weight", torch.ones(4), (4,))
        raise RuntimeError("collective failed")

    with pytest.raises(CheckpointError, match="gathering a tensor failed: RuntimeError: collective failed"):
        write_checkpoint(run_checkpoints, 200, pieces(), {})
    assert list(run_checkpoints.iterdir()) == [checkpoint]


def test_a_directory_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "run").write_text("a file where a directory should be")
    with pytest.raises(CheckpointError, match="could not be saved"):
        write_checkpoint(tmp_path / "run" / "checkpoints", 1, [], {})


def test_what_a_dead_save_left_is_removed_by_the_next(checkpoint, run_checkpoints, tensors, whole_pieces):
    for name in ("tmp-step-00000150", "tmp-step-00000200", "tmp-removed-step-00000050"):
        (run_checkpoints / name).mkdir()
        (run_checkpoints / name / "shard-00000-0000.safetensors").write_bytes(b"partial")
    (run_checkpoints / "notes").mkdir()
    second = write_checkpoint(run_checkpoints, 200, whole_pieces(tensors), {})
    assert sorted(run_checkpoints.iterdir()) == [run_checkpoints / "notes", checkpoint, second]


@pytest.fixture(scope="module")
def saved_alone(tmp_path_factory) -> tuple[Path, str]:
    """Directory and output of one process that saved in vain; starting torch is what takes the time."""
    directory = tmp_path_factory.mktemp("alone")
    return directory, finish(start("alone", directory))


def test_a_save_killed_at_any_point_leaves_the_earlier_checkpoint_the_newest(saved_alone):
    directory = saved_alone[0] / "killed"
    assert len(list(directory.iterdir())) == NUM_PHASES
    for phase in range(NUM_PHASES):
        run = directory / str(phase)
        newest = newest_checkpoint(run, verify_checksums=True)
        expected = "step-00000100" if phase < NUM_PHASES_BEFORE_RENAME else "step-00000200"
        assert newest is not None and newest.name == expected, f"phase {phase}"
        # The restarted run saves the same step again over whatever the dead one left.
        repeated = [TensorPiece(f"w{index}", "weight", torch.full((64,), 2.0), (64,)) for index in range(3)]
        again = write_checkpoint(run, 200, repeated, {})
        assert torch.equal(CheckpointReader(again).read("w2"), torch.full((64,), 2.0))
        assert sorted(path.name for path in run.iterdir()) == ["step-00000100", "step-00000200"]


def test_a_write_that_the_system_cuts_short_is_reported(saved_alone):
    directory, message = saved_alone
    assert "step 200 could not be saved" in message and "File too large" in message
    assert [path.name for path in (directory / "full").iterdir()] == ["step-00000100"]


def test_two_ranks_save_together_and_fail_together(tmp_path):
    processes = [start("ranks", tmp_path, rank) for rank in (0, 1)]
    try:
        for process in processes:
            finish(process)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    messages = (tmp_path / "messages-0").read_text()
    assert messages == (tmp_path / "messages-1").read_text()
    rank_1_fails, left, rank_0_fails, left_again = messages.split("\n")
    assert "rank 1: OSError: [Errno 28] No space left on device" in rank_1_fails
    assert "rank 0: OSError: [Errno 28] No space left on device" in rank_0_fails
    assert left == left_again == "step-00000100"

    run = tmp_path / "checkpoints"
    assert len(list_checkpoints(run)) == 2
    reader = CheckpointReader(run / "step-00000200")
    reader.verify()
    assert sorted(path.name for path in reader.path.glob("shard-*")) == [
        f"shard-{rank:05d}-{index:04d}.safetensors" for rank in range(2) for index in range(6)
    ]
    for index in range(6):
        whole = torch.tensor([[10.0 * index]] * 2 + [[10.0 * index + 1]] * 2).expand(4, 64)
        assert torch.equal(reader.read(f"w{index}", dimension=0, offset=1, length=2), whole[1:3])
        assert torch.equal(reader.read(f"w{index}", dimension=1, offset=60), whole[:, 60:])
    assert CheckpointReader(run / "step-00000100").state == {"saved_by": 0}
