"""Programs in which the system itself fails a run: signals at a given moment, a disk without room.

Run by itself, this is ``pretrain``, and the first save of step 4 waits, half of a shard on disk, for the file GO_ON.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain import signals
from pretrain.checkpoint import shards
from pretrain.config import parse_config
from pretrain.errors import TrainingError
from pretrain.signals import HANDLED
from pretrain.train import train
from pretrain.trainer import Trainer
from tests.training.saving_programs import heard, replaced

# Where a signal comes: what of a run is called at that moment.
PHASES: dict[str, tuple[Any, str]] = {
    "reading data": (Trainer, "read_step"),
    "a step": (Trainer, "train_step"),
    "an evaluation": (Trainer, "evaluate"),
    "a save": (shards, "save_file"),
    "waiting for a save": (Trainer, "finish_saving"),
}


def signalled(raw: dict[str, Any], phase: str, number: int) -> tuple[int, bool]:
    """Trains; a signal comes in the first call of ``phase``. The last step, and whether the signal ended the run."""
    owner, name = PHASES[phase]
    sent: list[int] = []

    def make(original: Callable) -> Callable:
        def signalling(*arguments: Any, **options: Any) -> Any:
            if not sent:
                sent.append(number)
                os.kill(os.getpid(), number)
            return original(*arguments, **options)

        return signalling

    with replaced(owner, name, make):
        outcome = train(parse_config(raw, "test"))
    assert sent == [number], "the phase never came"
    return outcome.step, outcome.stopped_by_signal


def interrupted_twice(raw: dict[str, Any], step: int) -> str:
    """Trains; Ctrl-C and, on purpose, Ctrl-C again while the first shard of ``step`` is written. What came of it."""

    def make(save_file: Callable) -> Callable:
        def interrupting(tensors: Any, path: Any, **options: Any) -> None:
            if path.parent.name.endswith(f"{step:08}"):
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
            save_file(tensors, path, **options)

        return interrupting

    with (
        replaced(shards, "save_file", make),
        replaced(signals, "SECONDS_OF_ONE_WISH", lambda _: -1.0),
    ):
        try:
            train(parse_config(raw, "test"))
        except KeyboardInterrupt:
            return "interrupted at once"
    return "went on"


def signalled_after_the_end(raw: dict[str, Any]) -> tuple[int, bool]:
    """Trains as the command does, and sends every signal once the run is over."""
    earlier = {number: signal.getsignal(number) for number in HANDLED}
    try:
        outcome = train(parse_config(raw, "test"), process_ends=True)
        for number in HANDLED:
            os.kill(os.getpid(), number)
            # What the system itself does with it, which stays so until the process is gone.
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    return outcome.step, outcome.stopped_by_signal


def without_room(raw: dict[str, Any], first: int, last: int) -> tuple[list[str], str | None]:
    """Trains while no file may grow by more than 100 bytes in the steps ``first`` to ``last``, as on a full disk.

    The limit is the system's own, so that writes themselves fail, some of them halfway.

    Returns:
        The messages, and what ended the run, if anything.
    """
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make(read_step: Callable) -> Callable:
        def limiting(self: Trainer) -> Any:
            if self.position.step + 1 == first:
                # A save that still goes on would fail too.
                self.saver.wait()
                size = self.run.metrics_file.stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, unlimited[1]))
            if self.position.step == last:
                self.saver.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            return read_step(self)

        return limiting

    with heard() as messages, replaced(Trainer, "read_step", make):
        try:
            train(parse_config(raw, "test"))
        except TrainingError as error:
            return messages, str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return messages, None


def signalled_while_saving(
    raw: dict[str, Any], step: int, number: int, ranks: list[int], stop_first: bool
) -> tuple[int, bool]:
    """Trains; ``number`` comes to each of ``ranks`` when its first shard of ``step`` is half written.

    Args:
        stop_first: whether that save is one that a signal to rank 0 began, in reading the data of ``step``.

    Returns:
        The last step, and whether a signal ended the run.
    """
    sent: list[int] = []

    def make(save_file: Callable) -> Callable:
        def signalling(tensors: Any, path: Any, **options: Any) -> None:
            save_file(tensors, path, **options)
            if path.parent.name.endswith(f"{step:08}") and not sent:
                content = path.read_bytes()
                os.truncate(path, len(content) // 2)
                sent.append(number)
                if dist.get_rank() in ranks:
                    os.kill(os.getpid(), number)
                path.write_bytes(content)

        return signalling

    def stop(read_step: Callable) -> Callable:
        def stopping(self: Trainer) -> Any:
            if stop_first and self.position.step + 1 == step and dist.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return read_step(self)

        return stopping

    with replaced(shards, "save_file", make), replaced(Trainer, "read_step", stop):
        outcome = train(parse_config(raw, "test"))
    assert sent == [number], "the save never came"
    return outcome.step, outcome.stopped_by_signal


def _save_when_told(tensors: Any, path: Path, **options: Any) -> None:
    """Half of a shard of step 4, and the rest when a file says so."""
    _save_whole(tensors, path, **options)
    if path.parent.name.endswith(f"{4:08}"):
        content = path.read_bytes()
        os.truncate(path, len(content) // 2)
        print("half of a shard is written", flush=True)
        while not Path(os.environ["GO_ON"]).exists():
            time.sleep(0.001)
        path.write_bytes(content)


_save_whole = shards.save_file

if __name__ == "__main__":
    from pretrain import cli

    shards.save_file = _save_when_told
    cli.main()
