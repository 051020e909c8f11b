"""Killed a hundred times at random moments, a run goes on each time, and its curve is that of an unbroken one."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import list_checkpoints
from tests.runs import curve, write_config

KILLS = 100
# A process dies while it starts, or after at most so many steps of its own; every third one saves.
START_SECONDS, STEPS_OF_ITS_OWN = 2.0, 9


def run(config: str, steps: int, log: str) -> None:
    """A process: what ``pretrain train`` does."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    import torch

    from pretrain.config import load_config
    from pretrain.train import train

    torch.set_num_threads(1)
    train(load_config(Path(config), [f"train.steps={steps}"]))


@pytest.fixture
def start() -> Iterator[Callable[[Path, int, Path], multiprocessing.Process]]:
    """``start(config, steps, log)``: a process that trains; none is left when the test is over, however it ends."""
    # A server imports everything once, and each process is a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain.train", "pretrain.parallel.zero"])
    processes = []

    def begin(config: Path, steps: int, log: Path) -> multiprocessing.Process:
        process = context.Process(target=run, args=(str(config), steps, str(log)))
        process.start()
        processes.append(process)
        return process

    try:
        yield begin
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.slow
def test_every_kill_resumes_to_the_unbroken_curve(
    start: Callable[[Path, int, Path], multiprocessing.Process], tmp_path: Path
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    train = {"checkpoint_every": 3, "evaluate_every": 0, "keep_last": 2}
    configs = {}
    for directory in (killed, whole):
        directory.mkdir()
        # Of the same corpus.
        data = {"source": {"type": "text_files", "path": str(killed / "corpus"), "pattern": "*.txt"}}
        configs[directory] = write_config(directory, schedule={"type": "constant"}, train=train, data=data)

    log = tmp_path / "log.txt"
    metrics = killed / "run" / "metrics.jsonl"

    def live(process: multiprocessing.Process, chance: random.Random) -> None:
        """Until a random moment."""
        if chance.random() < 0.2:
            process.join(chance.uniform(0.0, START_SECONDS))
            return
        # The log is cut back to the newest checkpoint before the first step, and grows by a line with each.
        first = reached[-1] if reached else 0
        # That moment may be missed where the machine is busy: then any other does.
        wanted, deadline = first + chance.randint(1, STEPS_OF_ITS_OWN), time.monotonic() + 20
        seen_start = False
        while process.exitcode is None and time.monotonic() < deadline:
            process.join(0.005)
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            seen_start |= lines == first
            if seen_start and lines >= wanted:
                break
        process.join(chance.uniform(0.0, 0.1))

    chance, reached = random.Random(0), []
    for _ in range(KILLS):
        process = start(configs[killed], 1_000_000, log)
        live(process, chance)
        assert process.exitcode is None, "ended by itself: " + log.read_text()[-3000:]
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        saved = list_checkpoints(killed / "run" / "checkpoints") if (killed / "run" / "checkpoints").exists() else []
        reached.append(int(saved[-1].name.removeprefix("step-")) if saved else 0)
    assert reached == sorted(reached), "a step that was saved was lost"
    assert len(set(reached)) > KILLS / 10 and reached[-1] > 0, "killed before anything was done, which shows little"
    last = reached[-1] + 6
    for directory in (killed, whole):
        process = start(configs[directory], last, log)
        process.join(60 + last)
        assert process.exitcode == 0, log.read_text()[-3000:]
    assert curve(killed / "run") == curve(whole / "run")
    assert not [path for path in (killed / "run" / "checkpoints").iterdir() if not path.name.startswith("step-")]
    print(f"{KILLS} kills, {last} steps, {time.process_time():.0f} s")
