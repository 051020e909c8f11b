"""A disk without room, or one that may only be read, costs checkpoints at most, and says so."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import CheckpointReader, list_checkpoints, newest_checkpoint
from pretrain.errors import EXIT_DONE, EXIT_FAILURE
from tests.runs import curve, environment, pretrain, pretrain_command, raw_config, write_config, write_corpus

PROGRAMS = "tests.training.fault_programs"


def run_config(directory, **train):
    """A run of 12 steps that saves steps 4, 8 and 12."""
    write_corpus(directory / "corpus")
    return raw_config(directory, train=train) | {"schedule": {"type": "constant"}}


def names(directory):
    return sorted(path.name for path in (directory / "run" / "checkpoints").iterdir())


def lines_of(directory):
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_no_line_of_the_log(worker_pools, tmp_path):
    whole = tmp_path / "whole"
    worker_pools(1).run("tests.training.programs", "run_training", raw=run_config(whole))
    ((messages, ended),) = worker_pools(1).run(PROGRAMS, "without_room", raw=run_config(tmp_path), first=6, last=9)
    assert ended is None
    (behind,) = [text for text in messages if "CANNOT BE WRITTEN (File too large)" in text]
    assert "metrics.jsonl" in behind and "kept in memory" in behind
    assert [text for text in messages if "is written again, with the lines that were kept" in text]
    (not_saved,) = [text for text in messages if text.startswith("NOT SAVED")]
    assert "step 8 could not be saved" in not_saved and "File too large" in not_saved
    assert names(tmp_path) == ["step-00000004", "step-00000012"]
    assert curve(tmp_path / "run") == curve(whole / "run")
    assert lines_of(tmp_path)[-1]["failed_checkpoints"] == 1


def test_a_disk_that_stays_full_ends_the_run_with_the_earlier_checkpoint(worker_pools, tmp_path):
    raw = run_config(tmp_path)
    ((messages, ended),) = worker_pools(1).run(PROGRAMS, "without_room", raw=raw, first=6, last=13)
    assert "step 12 could not be saved" in ended and "File too large" in ended
    assert any("its last lines could not be written: File too large" in text for text in messages)
    assert names(tmp_path) == ["step-00000004"]
    CheckpointReader(newest_checkpoint(tmp_path / "run" / "checkpoints")).verify()
    # With room again, the half line that the disk took is mended and the run goes on.
    worker_pools(1).run("tests.training.programs", "run_training", raw=raw)
    assert set(curve(tmp_path / "run")) == set(range(1, 13)) and names(tmp_path)[-1] == "step-00000012"


@contextlib.contextmanager
def small_file_system(place: Path) -> Iterator[None]:
    """Three megabytes in memory; skips where this process may not mount."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_a_small_file_system_that_fills_up_and_a_log_without_room(tmp_path):
    """The command with its run on a disk that holds one checkpoint but not two, and its output on one that is full."""
    with small_file_system(tmp_path / "disk"):
        run = {"directory": str(tmp_path / "disk" / "run")}
        config = write_config(tmp_path, run=run, schedule={"warmup_steps": 0})
        first = pretrain("train", config, "train.steps=1")
        assert first.returncode == EXIT_DONE, first.stderr
        checkpoints = tmp_path / "disk" / "run" / "checkpoints"
        taken = sum(file.stat().st_size for file in (checkpoints / "step-00000001").iterdir())
        (tmp_path / "disk" / "ballast").write_bytes(bytes(3 * 2**20 - 2 * taken + taken // 2))
        with open("/dev/full", "w") as full:
            command = pretrain_command("train", config, "train.steps=12")
            ended = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True)
        assert ended.returncode == EXIT_FAILURE, ended.stderr
        (said,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert re.search(r"step 12 could not be saved in .*No space left on device", said)
        assert newest_checkpoint(checkpoints, verify_checksums=True).name == "step-00000001"
        assert not list(checkpoints.glob("tmp-*"))
        (tmp_path / "disk" / "ballast").unlink()
        again = pretrain("train", config, "train.steps=12")
        assert again.returncode == EXIT_DONE, again.stderr
        assert list_checkpoints(checkpoints)[-1].name == "step-00000012"


@pytest.mark.slow
def test_a_run_directory_that_may_only_be_read_from_is_refused_by_name(tmp_path):
    with small_file_system(tmp_path / "disk"):
        run = {"directory": str(tmp_path / "disk" / "run")}
        config = write_config(tmp_path, run=run, schedule={"warmup_steps": 0})
        assert pretrain("train", config, "train.steps=1").returncode == EXIT_DONE
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        ended = pretrain("train", config, "train.steps=4")
        assert ended.returncode == 2, ended.stderr
        (said,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert "run.directory" in said and "Read-only file system" in said
