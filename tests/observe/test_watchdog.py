"""A run that hangs ends by itself, and says who it waited for."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import time

import pytest

from pretrain.errors import EXIT_HUNG
from pretrain.observe.watchdog import HEARTBEATS, STACKS, Heartbeat, Watchdog, describe
from tests.runs import environment, pretrain_command, started, write_config

BEAT = Heartbeat(rank=0, process=11, step=7, count=20, phase="optimizer step", heard=1000.0)


def beat(rank: int, **fields) -> Heartbeat:
    return dataclasses.replace(BEAT, rank=rank, **fields)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([beat(1), beat(2)], "all ranks are in the same phase"),
        ([beat(1, count=19, phase="reading data"), beat(2)], r"the others wait for rank 1 in step 7 \(reading data\)$"),
        (
            [beat(1, heard=900.0, process=12, phase="forward and backward"), beat(2)],
            r"^rank 1 has not been heard of for 100 s, since step 7 \(forward and backward\): its process \(pid 12\)",
        ),
        ([beat(2)], "^rank 1 was never heard of$"),
    ],
)
def test_it_names_who_the_others_wait_for(others: list[Heartbeat], said: str) -> None:
    beats = {found.rank: found for found in (BEAT, *others)}
    assert re.search(said, describe(BEAT, beats, world_size=3, stale=5.0))


def test_progress_keeps_it_quiet_and_nothing_is_left(tmp_path, capfd) -> None:
    ended: list[int] = []
    with Watchdog(tmp_path, 0, 1, seconds=1.0, end=ended.append) as watchdog:
        for step in range(12):
            watchdog.begin(step, "forward and backward")
            time.sleep(0.15)
        assert [file.name for file in (tmp_path / HEARTBEATS).glob("*.json")] == ["rank-00000.json"]
    assert ended == [] and list(tmp_path.iterdir()) == []
    assert "watchdog" not in capfd.readouterr().err


def test_without_progress_it_writes_stacks_and_ends_the_process(tmp_path, capfd) -> None:
    ended: list[int] = []
    with Watchdog(tmp_path, 3, 4, seconds=0.3, end=ended.append) as watchdog:
        watchdog.begin(5, "reading data")
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ended == [EXIT_HUNG]
    said = capfd.readouterr().err
    assert "rank 3 has made no progress for" in said and "in step 5 (reading data)" in said
    assert "rank 0 was never heard of" in said
    stacks = (tmp_path / STACKS / "rank-00003.txt").read_text()
    assert "test_without_progress_it_writes_stacks_and_ends_the_process" in stacks


def test_it_can_be_left_out(tmp_path) -> None:
    with Watchdog(tmp_path, 0, 1, seconds=None) as watchdog:
        watchdog.begin(1, "reading data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_ends(tmp_path) -> None:
    config = write_config(tmp_path)
    command = pretrain_command("train", config, "train.steps=100000", "train.hang_seconds=4", processes=2)
    output: list[str] = []
    stopped = None
    with started(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            output.append(line)
            if stopped is None and line.startswith("step 3/"):
                beats = tmp_path / "run" / HEARTBEATS / "rank-00001.json"
                while not beats.exists():
                    time.sleep(0.05)
                stopped = int(json.loads(beats.read_text())["process"])
                os.kill(stopped, signal.SIGSTOP)
            # So that the launcher need not wait for its time limit to kill it.
            if stopped is not None and line.startswith("watchdog: the stacks"):
                os.kill(stopped, signal.SIGCONT)
        process.wait(timeout=120)
    text = "".join(output)
    assert process.returncode != 0
    assert "watchdog: rank 0 has made no progress for" in text, text
    assert f"(pid {stopped}) is stopped or gone" in text
    assert "pretrain/train.py" in (tmp_path / "run" / STACKS / "rank-00000.txt").read_text()
