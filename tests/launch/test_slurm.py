"""Jobs of a real SLURM: two nodes train, are told to end, are requeued, and go on as if nothing had been."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.attempts import read_attempts
from pretrain.observe.metrics import read_metrics
from tests.launch.local_slurm import LocalSlurm, install

pytestmark = pytest.mark.slow

STEPS = 40
SETTINGS = [
    f"train.steps={STEPS}",
    "train.micro_batch_size=2",
    "train.checkpoint_every=10",
    "train.evaluate_samples=4",
]
LAUNCH = [
    "launch.request_gpus=none",
    "launch.environment={OMP_NUM_THREADS: '1'}",
    "launch.wait_seconds=1",
    "launch.nodes=2",
    "launch.gpus_per_node=1",
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    install()
    cluster = LocalSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        yield cluster
    finally:
        cluster.stop()


def submit(slurm: LocalSlurm, run: Path, *overrides: str) -> str:
    command = [sys.executable, "-m", "pretrain", "launch", "configs/runs/xlstm_tiny.yaml", f"run.directory={run}"]
    command += [*SETTINGS, *LAUNCH, f"launch.kernel_cache={run.parent}", *overrides, "--time", "00:30:00", "--submit"]
    done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def log(run: Path, job: str) -> str:
    file = run / "launch" / f"job-{job}.log"
    return file.read_text() if file.exists() else "(no log)"


def steps_of(run: Path) -> int:
    return len(read_metrics(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else 0


def run_to_its_end(slurm: LocalSlurm, run: Path, job: str) -> None:
    """A requeued job waits two minutes by itself; here it need not."""

    def is_over() -> bool:
        state = slurm.state(job)
        if state == "PD":
            slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")
        return not state

    slurm.wait(is_over, 600, f"job {job} to end: {log(run, job)}")


@pytest.mark.parametrize("starter", ["torchrun", "srun"])
def test_a_job_that_is_told_to_end_goes_on_to_the_same_curve(slurm: LocalSlurm, tmp_path: Path, starter: str) -> None:
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    job = submit(slurm, run, f"launch.starter={starter}")
    slurm.wait(lambda: steps_of(run) > 5, 300, "some steps of the job")
    slurm.call("scancel", "--signal=USR1", "--batch", job)
    run_to_its_end(slurm, run, job)
    attempts = read_attempts(run)
    assert [attempt.how for attempt in attempts] == ["stopped", "done"], log(run, job)
    assert 5 < attempts[0].step < STEPS and attempts[0].checkpoint == attempts[0].step
    assert attempts[0].nodes == "n0,n1" and "node n1: " in log(run, job)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pretrain"]
    command += ["train", "configs/runs/xlstm_tiny.yaml", f"run.directory={unbroken}", *SETTINGS]
    subprocess.run(command, env=slurm.environment | {"OMP_NUM_THREADS": "1"}, check=True)
    expected, found = (
        [record["loss"] for record in read_metrics(where / "metrics.jsonl")] for where in (unbroken, run)
    )
    assert found == expected


def test_a_job_that_fails_twice_alike_ends_the_chain(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, "launch.setup=['exit 9']")
    run_to_its_end(slurm, run, job)
    assert [attempt.how for attempt in read_attempts(run)] == ["lost", "lost"], log(run, job)
    assert "before its first step twice" in log(run, job)


def test_a_run_that_diverged_is_not_tried_again(slurm: LocalSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, "optimizer.learning_rate=1e30", "train.max_skipped_steps=1", "launch.check_nodes=false")
    run_to_its_end(slurm, run, job)
    assert [attempt.how for attempt in read_attempts(run)] == ["diverged"], log(run, job)
    assert "not tried again: 1 steps in a row had no finite gradient" in log(run, job)
