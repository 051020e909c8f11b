"""Signals to one rank of several, or to all, while a checkpoint is written: it is whole, and nothing is lost."""

from __future__ import annotations

import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from pretrain.checkpoint import list_checkpoints
from pretrain.checkpoint.commands import verify
from pretrain.errors import EXIT_DONE, EXIT_STOPPED_BY_SIGNAL
from tests.runs import Running, curve, pretrain, raw_config, write_corpus

PROGRAMS = "tests.training.fault_programs"
STEPS = 8
# Of two ranks, those that the signal comes to.
TO = {"the first": [0], "the second": [1], "all": [0, 1]}


def run_config(directory: Path, mode: str) -> dict:
    """A run of two ranks that saves every fourth step; its schedule does not know that a run is cut."""
    if not (directory / "corpus").exists():
        write_corpus(directory / "corpus")
    train = {"steps": STEPS, "evaluate_every": 0, "checkpoint_every": 4, "checkpoint_mode": mode}
    return raw_config(directory, train=train) | {"schedule": {"type": "constant"}}


@pytest.fixture(scope="module")
def unbroken(worker_pools, tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    raw = run_config(directory, "synchronous")
    worker_pools(2).run("tests.training.programs", "run_training", raw=raw)
    return curve(directory / "run")


def whole_checkpoints(directory: Path) -> list[int]:
    """Steps that are saved, each read to its end; fails where anything else lies beside them."""
    checkpoints = directory / "run" / "checkpoints"
    saved = list_checkpoints(checkpoints)
    assert sorted(entry.name for entry in checkpoints.iterdir()) == [path.name for path in saved]
    return [verify(path)["step"] for path in saved]


@pytest.mark.parametrize(
    ("mode", "number", "to", "begun_by_a_signal"),
    [
        ("synchronous", signal.SIGTERM, "the second", False),
        ("asynchronous", signal.SIGUSR1, "all", False),
        ("asynchronous", signal.SIGTERM, "the second", True),
        pytest.param("synchronous", signal.SIGUSR1, "all", True, marks=pytest.mark.slow),
        pytest.param("asynchronous", signal.SIGUSR1, "the first", False, marks=pytest.mark.slow),
        pytest.param("asynchronous", signal.SIGTERM, "all", True, marks=pytest.mark.slow),
    ],
)
def test_it_ends_saved_and_goes_on_to_the_same_curve(
    mode, number, to, begun_by_a_signal, worker_pools, unbroken, tmp_path
):
    raw = run_config(tmp_path, mode)
    arguments = {"step": 4, "number": int(number), "ranks": TO[to], "stop_first": begun_by_a_signal}
    ends = worker_pools(2).run(PROGRAMS, "signalled_while_saving", raw=raw, **arguments)
    (step, stopped), other = ends
    assert other == (step, stopped) and stopped
    # Beside training the step that goes on meanwhile is a later one, but the next save waits for this.
    assert step == 4 if begun_by_a_signal else step == 5 if mode == "synchronous" else 5 <= step < STEPS + 1
    assert whole_checkpoints(tmp_path) == sorted({4, step})
    assert worker_pools(2).run("tests.training.programs", "run_training", raw=raw) == [(STEPS, False)] * 2
    assert curve(tmp_path / "run") == unbroken


def told_in_a_save(directory: Path, config: Path, number: int, to: str) -> tuple[list[int], str]:
    """Two processes as a launcher starts them; the signal comes while both have half of a shard on disk.

    Returns:
        Their exit codes, and what they printed.
    """
    go_on = directory / "go on"
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    job["GO_ON"] = str(go_on)
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                Running(PROGRAMS, "train", config, variables=job | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            )
            for rank in range(2)
        ]
        output = []
        for process in ranks:
            for line in process.stdout:
                output.append(line)
                if line == "half of a shard is written\n":
                    break
            else:
                pytest.fail("no save came:\n" + "".join([*output, process.stderr.read()]))
        for rank in TO[to]:
            ranks[rank].send_signal(number)
        go_on.touch()
        ended = [process.finish() for process in ranks]
    text = "".join([*output, *(process.stdout + process.stderr for process in ended)])
    return [process.returncode for process in ended], text


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("to", TO)
def test_the_command_on_two_ranks(mode, number, to, unbroken, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_config(tmp_path, mode)))
    codes, text = told_in_a_save(tmp_path, config, number, to)
    assert codes == [EXIT_STOPPED_BY_SIGNAL] * 2, text
    assert "stopped by a signal after step" in text
    saved = whole_checkpoints(tmp_path)
    assert saved[0] == 4 and len(saved) <= 2
    ended = pretrain("train", config, ranks=2)
    assert ended.returncode == EXIT_DONE, ended.stderr
    assert curve(tmp_path / "run") == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("to", TO)
def test_the_command_in_its_last_save_ends_as_if_nothing_had_come(number, to, unbroken, tmp_path):
    config = tmp_path / "config.yaml"
    raw = run_config(tmp_path, "asynchronous")
    config.write_text(yaml.safe_dump(raw | {"train": raw["train"] | {"steps": 4}}))
    codes, text = told_in_a_save(tmp_path, config, number, to)
    assert codes == [EXIT_DONE] * 2, text
    assert whole_checkpoints(tmp_path) == [4]
    config.write_text(yaml.safe_dump(raw))
    assert pretrain("train", config, ranks=2).returncode == EXIT_DONE
    assert curve(tmp_path / "run") == unbroken
