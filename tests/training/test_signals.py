"""A signal loses nothing, whatever a run is doing when it comes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.checkpoint import list_checkpoints
from pretrain.errors import EXIT_DONE
from tests.runs import curve, environment, raw_config, started, write_config, write_corpus

PROGRAMS = "tests.training.fault_programs"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture
def config(corpus, tmp_path):
    """A run of six steps that evaluates and saves every second one."""
    shutil.copytree(corpus, tmp_path / "corpus")
    train = {"steps": 6, "evaluate_every": 2, "checkpoint_every": 2, "checkpoint_mode": "synchronous"}
    return raw_config(tmp_path, train=train) | {"schedule": {"type": "constant"}}


def names(directory):
    return sorted(path.name for path in (directory / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("phase", "number", "stopped_after"),
    # During an evaluation or a save of step 2 the run ends after step 3.
    [
        ("reading data", signal.SIGTERM, 1),
        ("a step", signal.SIGUSR1, 1),
        ("an evaluation", signal.SIGTERM, 3),
        ("a save", signal.SIGUSR1, 3),
    ],
)
def test_a_signal_in_any_phase_ends_the_run_after_its_step_saved(
    phase, number, stopped_after, worker_pools, config, tmp_path
):
    ends = worker_pools(1).run(PROGRAMS, "signalled", raw=config, phase=phase, number=int(number))
    assert ends == [(stopped_after, True)]
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert saved[-1].name == f"step-{stopped_after:08}" and names(tmp_path) == [path.name for path in saved]
    assert set(curve(tmp_path / "run")) == set(range(1, stopped_after + 1))


def test_a_signal_while_the_last_step_is_saved_changes_nothing(worker_pools, config, tmp_path):
    arguments = {"phase": "waiting for a save", "number": int(signal.SIGUSR1)}
    assert worker_pools(1).run(PROGRAMS, "signalled", raw=config, **arguments) == [(6, False)]
    assert names(tmp_path)[-1] == "step-00000006"


def test_signals_after_the_end_do_not_change_how_the_process_ends(worker_pools, config):
    assert worker_pools(1).run(PROGRAMS, "signalled_after_the_end", raw=config) == [(6, False)]


def test_a_second_interrupt_during_a_save_leaves_the_one_before_and_the_run_goes_on(worker_pools, config, tmp_path):
    ended = worker_pools(1).run(PROGRAMS, "interrupted_twice", raw=config, step=4)
    assert ended == ["interrupted at once"]
    assert names(tmp_path) == ["step-00000002", "tmp-step-00000004"]
    worker_pools(1).run("tests.training.programs", "run_training", raw=config)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000006"]
    cut = curve(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    worker_pools(1).run("tests.training.programs", "run_training", raw=config)
    assert curve(tmp_path / "run") == cut


# The command itself, told to stop when training is over, and once more when Python is about to end.
_TOLD_LATE = """
import atexit, os, signal, sys
from pretrain import cli
from pretrain import train as module

def stop():
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(os.getpid(), number)

original = module.train
def then_stop(*arguments, **options):
    outcome = original(*arguments, **options)
    stop()
    return outcome

module.train = then_stop
atexit.register(stop)
sys.argv[0] = "pretrain"
cli.main()
"""


@pytest.mark.slow
def test_the_command_ends_with_its_own_code_whatever_comes_after_the_last_step(tmp_path):
    config = write_config(tmp_path)
    command = [sys.executable, "-c", _TOLD_LATE, "train", str(config), "train.steps=3"]
    ended = subprocess.run(
        command, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == EXIT_DONE, ended.stderr
    assert names(tmp_path) == ["step-00000003"]


@pytest.mark.slow
def test_a_signal_before_training_begins_ends_the_process_and_the_next_start_is_the_first(tmp_path):
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "pretrain", "train", str(config), "train.steps=3"]
    with started(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not (tmp_path / "run" / "environment.json").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == EXIT_DONE, ended.stderr
    assert set(curve(tmp_path / "run")) == {1, 2, 3}
