"""Preparations that are killed at any point, or run at once: what is written in the end is always the same."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.preparation import files
from data.preparation.shards import ShardWriter
from tests.data.preparing import contents, prepare_into, text_config, write_texts
from tests.runs import Running

# Everything by which a preparation changes the disk goes through one of these.
STEPS: tuple[tuple[object, str], ...] = (
    (files, "flush_file"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "mkdir"),
    (ShardWriter, "add"),
)


def count_steps(at_step: Callable[[int], None]) -> None:
    """Calls ``at_step`` in front of each step with its number, from 0."""
    from data.preparation import shards

    done = 0

    def counting(original: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **options: object) -> object:
            nonlocal done
            done += 1
            at_step(done - 1)
            return original(*arguments, **options)

        return step

    for owner, name in STEPS:
        setattr(owner, name, counting(getattr(owner, name)))
    shards.flush_file = files.flush_file


def in_a_fork(work: Callable[[], None]) -> int:
    """The exit code of a process that does ``work``; the negative signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(directory: Path, config: DataConfig, step: int, workers: int = 0) -> bool:
    """Prepares in a process that is killed in front of a step. Whether it came to that."""

    def kill(number: int) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        count_steps(kill)
        prepare_into(directory, config, workers=workers)

    return in_a_fork(work) == -signal.SIGKILL


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, bpe_file: Path) -> tuple[DataConfig, dict[str, bytes]]:
    """A configuration, and what an unbroken preparation of it writes."""
    root = tmp_path_factory.mktemp("corpus")
    texts = write_texts(root / "texts", count=12)
    for copy in range(3):
        (texts / f"copy {copy}.txt").write_bytes((texts / "0001.txt").read_bytes())
    config = text_config(texts, tokenizer={"type": "huggingface", "path": str(bpe_file)})
    manifest = prepare_into(root / "unbroken", config)
    assert len(manifest.shards) >= 2 and manifest.duplicate_documents == 3
    return config, contents(root / "unbroken")


def test_killed_at_every_step(corpus: tuple[DataConfig, dict[str, bytes]], tmp_path: Path) -> None:
    config, expected = corpus
    step = 0
    while killed_at(tmp_path / str(step), config, step):
        prepare_into(tmp_path / str(step), config)
        assert contents(tmp_path / str(step)) == expected, f"killed in front of step {step}"
        step += 1
    assert contents(tmp_path / str(step)) == expected
    assert step > 40, "the steps are not seen"


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.integers(0, 40), min_size=2, max_size=6))
def test_killed_again_and_again(
    corpus: tuple[DataConfig, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory, steps: list[int]
) -> None:
    config, expected = corpus
    directory = tmp_path_factory.mktemp("killed") / "out"
    for step in steps:
        killed_at(directory, config, step)
    prepare_into(directory, config)
    assert contents(directory) == expected


def test_a_finished_directory_is_not_written_to(corpus: tuple[DataConfig, dict[str, bytes]], tmp_path: Path) -> None:
    config, expected = corpus
    prepare_into(tmp_path / "out", config)
    assert not killed_at(tmp_path / "out", config, 0)


def test_killed_while_others_tokenize(tmp_path: Path) -> None:
    source = {"type": "standard_library"}
    config = {"data": {"source": source, "tokenizer": {"type": "bytes"}, "sequence_length": 32}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    options = ["--workers", 2, "--shard-megabytes", 3]
    with Running("pretrain", "data", "prepare", tmp_path / "config.yaml", out, *options) as running:
        process = psutil.Process(running.pid)
        # The processes begin behind the first 8 MB, so they are at work when the fifth shard is done.
        wait_until(lambda: (out / "shard-00004.json").exists() or not process.is_running())
        others = process.children(recursive=True)
    assert len(others) >= 2, "no processes tokenized"
    wait_until(lambda: not any(process.is_running() and process.status() != "zombie" for process in others))
    assert (out / "unfinished.json").exists() and (out / "shard-00004.json").exists()
    prepare_into(out, DataConfig.model_validate(config["data"]), shard_megabytes=3)
    prepare_into(tmp_path / "unbroken", DataConfig.model_validate(config["data"]), shard_megabytes=3)
    assert contents(out) == contents(tmp_path / "unbroken")


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def test_who_waits_goes_on_when_the_first_is_killed(
    corpus: tuple[DataConfig, dict[str, bytes]], tmp_path: Path
) -> None:
    config, expected = corpus
    out = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    stopped, waiting = context.Event(), context.Event()

    def stop(number: int) -> None:
        if number == 30:
            stopped.set()
            signal.pause()

    def first() -> None:
        count_steps(stop)
        prepare_into(out, config)

    def second() -> None:
        from data.preparation import directory

        directory.logger.warning = lambda *_: waiting.set()
        prepare_into(out, config)

    processes = [context.Process(target=first), context.Process(target=second)]
    try:
        processes[0].start()
        assert stopped.wait(60)
        processes[1].start()
        assert waiting.wait(60), "the second did not see that there was a first"
        assert not (out / "manifest.json").exists()
        processes[0].kill()
        for process in processes:
            process.join(60)
        assert processes[1].exitcode == 0
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
    assert contents(out) == expected


@pytest.mark.parametrize("step", [5, 15, 35])
def test_without_locks_all_write_the_same(
    corpus: tuple[DataConfig, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config, expected = corpus

    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    out = tmp_path / "out"

    def another_finishes(number: int) -> None:
        if number == step:
            assert in_a_fork(lambda: prepare_into(out, config)) == 0

    def work() -> None:
        count_steps(another_finishes)
        try:
            prepare_into(out, config)
        except BaseException:
            os._exit(1)

    assert in_a_fork(work) == 0
    assert {name: content for name, content in contents(out).items() if name in expected} == expected
