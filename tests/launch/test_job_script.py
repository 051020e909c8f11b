"""The job's own shell, run as SLURM runs it, with stand-ins for SLURM's commands and for the run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import write_job
from launch.attempts import read_attempts
from tests.configurations import tiny_config
from tests.runs import started

COMMANDS = {
    # A job of one node with one task, whose steps have no output of their own.
    "srun": """while [ "${1#-}" != "$1" ]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 exec "$@" """,
    # As SLURM does, a requeue ends the job's shell.
    "scontrol": """case "$1 $2" in
  "show hostnames") echo n7 ;;
  "show node") echo "NodeName=$3 NodeAddr=10.0.0.7 NodeHostName=x" ;;
  requeue*) echo "$2" >> "$HERE/requeued"; kill -KILL $PPID ;;
esac""",
    "scancel": """echo "$@" >> "$HERE/scancelled"; kill -USR1 "$(cat "$HERE/pid")" """,
    "sbatch": """echo "$@" >> "$HERE/submitted" """,
    # The run: what it does is in a file, by the number of the attempt.
    "python": """if [ "$2" = pretrain.node_check ]; then
  echo "check $MASTER_ADDR $PRETRAIN_NODES" >> "$HERE/ran"
  [ ! -e "$HERE/unhealthy" ] && exit 0
  echo '{"how": "unhealthy", "message": "node n7 is broken"}' > "$PRETRAIN_ENDING"; exit 1
fi
echo "train $*" >> "$HERE/ran"
say() { echo "{\\"how\\": \\"$1\\", \\"message\\": \\"said\\"}" > "$PRETRAIN_ENDING"; }
case $(cat "$HERE/does") in
  finish) say done ;;
  break) say failed; exit 1 ;;
  # A shell cannot listen to what it was started to ignore.
  wait) exec "$REAL_PYTHON" "$HERE/waits.py" ;;
esac""",
}

WAITS = """
import json, os, pathlib, signal
def stop(*_):
    pathlib.Path(os.environ["PRETRAIN_ENDING"]).write_text(json.dumps({"how": "stopped", "message": "said"}))
    os._exit(0)
signal.signal(signal.SIGUSR1, stop)
here = pathlib.Path(os.environ["HERE"])
(here / "pid.new").write_text(str(os.getpid()))
(here / "pid.new").rename(here / "pid")
signal.pause()
"""


class Cluster:
    """A directory with the stand-ins, and a job written for them."""

    def __init__(self, directory: Path, **launch: object):
        self.directory, self.run = directory, directory / "run"
        commands = directory / "commands"
        commands.mkdir()
        for name, text in COMMANDS.items():
            (commands / name).write_text(f"#!/bin/bash\n{text}\n")
            (commands / name).chmod(0o755)
        (directory / "waits.py").write_text(WAITS)
        (directory / "scratch").mkdir()
        settings = {"gpus_per_node": 1, "python": str(commands / "python"), "wait_seconds": 0.0}
        settings |= {"kernel_cache": str(directory / "scratch"), **launch}
        self.files = write_job(tiny_config(str(self.run), launch=settings))
        self.environment = os.environ | {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "HERE": str(directory),
            "REAL_PYTHON": sys.executable,
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "n[7]",
        }

    @contextlib.contextmanager
    def start(self, does: str, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
        (self.directory / "does").write_text(does)
        environment = self.environment | {"SLURM_RESTART_COUNT": str(restarts)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with started(["bash", str(self.files.script)], env=environment, **pipes) as process:
            yield process

    def attempt(self, does: str, restarts: int = 0) -> tuple[int, str]:
        with self.start(does, restarts) as process:
            output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def lines(self, name: str) -> list[str]:
        file = self.directory / name
        return file.read_text().splitlines() if file.exists() else []


def test_a_run_that_finishes_ends_its_job(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, environment={"GREETING": "it's $HOME"}, setup=['echo "$GREETING" >> "$HERE/greeted"'])
    code, output = cluster.attempt("finish")
    assert code == 0 and "the run is done" in output, output
    check, train = cluster.lines("ran")
    assert check == "check 10.0.0.7 n7"
    assert "--nnodes 1 --node-rank 0 --nproc-per-node 1 --master-addr 10.0.0.7 --master-port 20042" in train
    assert train.endswith(f"-m pretrain train {cluster.files.config} --resume auto")
    assert cluster.lines("greeted") == ["it's $HOME"] * 2
    assert not cluster.lines("requeued")


@pytest.mark.parametrize("again", ["requeue", "submit", "never"])
def test_a_signal_ends_the_run_and_the_job_goes_on(tmp_path: Path, again: str) -> None:
    cluster = Cluster(tmp_path, again=again)
    with cluster.start("wait") as process:
        _until(lambda: (tmp_path / "pid").exists(), process)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    assert "told to end" in output and "stopped: said" in output, output
    assert cluster.lines("scancelled")[0] == "--signal=USR1 42"
    assert cluster.lines("requeued") == (["42"] if again == "requeue" else [])
    assert cluster.lines("submitted") == ([str(cluster.files.script)] if again == "submit" else [])
    assert [attempt.how for attempt in read_attempts(cluster.run)] == ["stopped"]
    assert process.returncode == {"requeue": -signal.SIGKILL, "submit": 0, "never": 3}[again]


def test_a_job_that_is_cancelled_saves_and_is_not_requeued(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    with cluster.start("wait") as process:
        _until(lambda: (tmp_path / "pid").exists(), process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 1 and not cluster.lines("requeued")
    assert [attempt.how for attempt in read_attempts(cluster.run)] == ["stopped"]


def test_failures_requeue_until_they_repeat(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    assert cluster.attempt("break")[0] == -signal.SIGKILL and cluster.lines("requeued") == ["42"]
    code, output = cluster.attempt("break", restarts=1)
    assert code == 1 and "before its first step twice" in output, output
    assert cluster.lines("requeued") == ["42"]


def test_nothing_is_trained_on_broken_nodes(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    (tmp_path / "unhealthy").touch()
    _, output = cluster.attempt("finish")
    assert "unhealthy: node n7 is broken" in output, output
    assert [line.split()[0] for line in cluster.lines("ran")] == ["check"]


def test_compiled_kernels_go_from_job_to_job(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, check_nodes=False)
    cache = tmp_path / "scratch" / f"pretrain-kernels-{os.getuid()}"
    cache.mkdir()
    (cache / "kernel").write_text("compiled")
    assert cluster.attempt("finish")[0] == 0
    (cache / "kernel").unlink()
    cluster.attempt("finish", restarts=1)
    assert (cache / "kernel").read_text() == "compiled"


def _until(holds, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, "the job ended, or hangs, before it trained"
        time.sleep(0.02)
