"""What an export or import that was killed leaves beside its place is cleared away by the next, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pretrain.convert import export_model
from pretrain.convert import output as module
from pretrain.convert.output import whole_directory
from tests.convert.checkpoints import write_run
from tests.runs import Running
from tests.workers import start_methods

HOST = module._host()


def _write_for_ever(output: Path, told: Connection) -> None:
    with whole_directory(output) as unfinished:
        (unfinished / "model.safetensors").write_bytes(b"half")
        told.send(unfinished.name)
        signal.pause()


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[tuple[int, Path]]:
    """A process that writes in a directory beside ``output`` and never comes to an end; its number, the directory."""
    _, context = start_methods()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_write_for_ever, args=(output, theirs))
    process.start()
    try:
        yield process.pid, output.with_name(ours.recv())
    finally:
        process.kill()
        process.join()


def test_an_export_clears_away_what_a_killed_one_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, _ = write_run(tmp_path / "run")
    output = tmp_path / "out"
    with _writing(output) as (number, left):
        assert left.name == f".out.unfinished-{HOST}-{number}"
        os.kill(number, signal.SIGKILL)
    assert (left / "model.safetensors").exists()
    (tmp_path / ".other.unfinished-host-1").mkdir()
    with caplog.at_level(logging.WARNING):
        export_model(run, output, check=False)
    (line,) = (record.getMessage() for record in caplog.records if "unfinished" in record.getMessage())
    assert line == f"removed {left}, left by a process that did not finish"
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "out", ".other.unfinished-host-1"}


@pytest.mark.parametrize("locks", [True, False])
def test_of_this_host_only_the_dead_are_cleared_away(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file system cannot lock directories, as NFS cannot."""

    def refuse(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    if not locks:
        monkeypatch.setattr(module.fcntl, "flock", refuse)
    output = tmp_path / "out"
    # An earlier process that had this one's number, as the first process of every container has.
    (tmp_path / f".out.unfinished-{HOST}-{os.getpid()}").mkdir()
    with _writing(output) as (number, theirs):
        with whole_directory(output) as mine:
            assert theirs.is_dir() and mine.is_dir() and not list(mine.iterdir())
        output.rmdir()
        os.kill(number, signal.SIGKILL)
    with whole_directory(output):
        assert not theirs.exists()
    assert list(tmp_path.iterdir()) == [output]


def test_of_another_host_nothing_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / ".out.unfinished-another-host-1"
    other.mkdir()
    with caplog.at_level(logging.WARNING), whole_directory(tmp_path / "out"):
        assert other.is_dir()
    (record,) = caplog.records
    assert record.getMessage() == f"{other} is left alone: it may be written in on another-host; else delete it"


@pytest.mark.slow
def test_the_command_killed_while_it_writes(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run")
    output = tmp_path / "out"
    arguments = ("export", run, output, "--no-check")
    with Running("pretrain", *arguments) as running:
        left = tmp_path / f".out.unfinished-{HOST}-{running.pid}"
        deadline = time.monotonic() + 60
        while not left.exists():
            assert time.monotonic() < deadline
        # Stopped first, so that it cannot end between two looks.
        running.send_signal(signal.SIGSTOP)
        assert left.exists() and not output.exists()
        running.send_signal(signal.SIGKILL)
    assert left.exists() and not output.exists()
    with Running("pretrain", *arguments) as running:
        ended = running.finish()
    assert ended.returncode == 0
    assert f"removed {left}, left by a process that did not finish" in ended.stderr
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "out"}
