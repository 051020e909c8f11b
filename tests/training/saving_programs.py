"""Programs whose checkpoints are held back, fail or are cut short while training goes on.

Run by itself, ``saving_programs.py CONFIG`` trains until half of the first shard of step 8 is on disk, says so, and
writes no further.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint import background, shards
from pretrain.checkpoint.saver import CheckpointSaver
from pretrain.config import load_config, parse_config
from pretrain.errors import TrainingError
from pretrain.observe.observer import Observer
from pretrain.train import train
from pretrain.trainer import Trainer


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """``owner.name`` is ``make(original)`` meanwhile."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """The messages of the run."""
    messages: list[str] = []

    def make(original: Callable) -> Callable:
        def message(self: Observer, text: str) -> None:
            messages.append(text)
            original(self, text)

        return message

    with replaced(Observer, "message", make):
        yield messages


def _step_of(path: Path) -> int:
    return int(Path(path).parent.name.removeprefix("tmp-step-"))


def second_save_waits(raw: dict[str, Any], held: int) -> tuple[list[str], list[int]]:
    """Trains; the files of step ``held`` are held back until a later save says that it waits for them.

    Returns:
        The messages, and the steps that were taken while the files were held back.
    """
    opened = threading.Event()
    begun = threading.Event()
    steps: list[int] = []

    def hold(save_file: Callable) -> Callable:
        def holding(tensors: Any, path: Path, **options: Any) -> None:
            if _step_of(path) == held:
                begun.set()
                assert opened.wait(60)
            save_file(tensors, path, **options)

        return holding

    def watch(train_step: Callable) -> Callable:
        def watching(self: Trainer, batches: Any) -> None:
            train_step(self, batches)
            if self.position.step > held and not opened.is_set():
                # Not only begun in Python: the files are under way.
                assert begun.wait(60) and self.saver.background.is_writing
                steps.append(self.position.step)

        return watching

    def wait(wait_for_it: Callable) -> Callable:
        def waiting(self: CheckpointSaver) -> None:
            if self.background is not None and self.background.is_writing:
                opened.set()
            wait_for_it(self)

        return waiting

    with (
        heard() as messages,
        replaced(shards, "save_file", hold),
        replaced(Trainer, "train_step", watch),
        replaced(CheckpointSaver, "wait", wait),
    ):
        train(parse_config(raw, "test"))
    return messages, steps


def stopped_while_saving(raw: dict[str, Any], held: int, number: int) -> tuple[bool, list[str]]:
    """The same; a signal comes in the second step while the files are held back, and nothing else opens the gate."""
    held_bytes: list[int] = []

    def signalled(train_step: Callable) -> Callable:
        def signalling(self: Trainer, batches: Any) -> None:
            train_step(self, batches)
            if self.position.step == held + 2 and self.saver.background.is_writing:
                os.kill(os.getpid(), number)

        return signalling

    def noted(holds: Callable) -> Callable:
        def noting(self: CheckpointSaver, kind: Any, *rest: Any) -> None:
            held_bytes.append(self.background.copies.num_bytes)
            holds(self, kind, *rest)

        return noting

    with replaced(Trainer, "train_step", signalled), replaced(CheckpointSaver, "__exit__", noted):
        messages, steps = second_save_waits(raw, held)
    assert steps == [held + 1, held + 2] and held_bytes == [0]
    return any("stopped by a signal" in text for text in messages), messages


def failing_save(raw: dict[str, Any], failing: int, rank: int) -> tuple[list[str], str | None]:
    """Trains while one rank cannot write the files of one step; its messages, and what ended it, if anything."""

    def fail(save_file: Callable) -> Callable:
        def no_space(tensors: Any, path: Path, **options: Any) -> None:
            if _step_of(path) == failing and dist.get_rank() == rank:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save_file(tensors, path, **options)

        return no_space

    with heard() as messages, replaced(shards, "save_file", fail):
        try:
            train(parse_config(raw, "test"))
        except TrainingError as error:
            return messages, str(error)
    return messages, None


def broken_group(raw: dict[str, Any], failing: int) -> tuple[list[str], bool]:
    """Trains while ranks lose each other in one save; the messages, and whether the next had a new group."""
    groups: list[Any] = []

    def lose(write_checkpoint: Callable) -> Callable:
        def losing(run_checkpoints: Path, step: int, *rest: Any, **options: Any) -> Path:
            groups.append(options["group"])
            if step == failing:
                raise RuntimeError("Connection reset by peer")
            return write_checkpoint(run_checkpoints, step, *rest, **options)

        return losing

    with heard() as messages, replaced(background, "write_checkpoint", lose):
        train(parse_config(raw, "test"))
    return messages, groups[0] is not groups[1]


def _write_half(tensors: Any, path: Path, **options: Any) -> None:
    _write_whole(tensors, path, **options)
    if _step_of(path) == 8:
        os.truncate(path, path.stat().st_size // 2)
        print("half of a shard is written", flush=True)
        threading.Event().wait()


_write_whole = shards.save_file

if __name__ == "__main__":
    shards.save_file = _write_half
    train(load_config(Path(sys.argv[1])))
