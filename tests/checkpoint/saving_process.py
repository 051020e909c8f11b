"""Programs that the failure tests run in processes of their own: killed saves, a full disk, two ranks.

Usage: ``saving_process.py alone DIRECTORY`` (killed saves, then a full disk) or
``saving_process.py ranks DIRECTORY RANK``.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint import CheckpointError, TensorPiece, shards, write_checkpoint, writer

KILLED = 77


def pieces(value: float) -> Iterator[TensorPiece]:
    for index in range(3):
        yield TensorPiece(f"w{index}", "weight", torch.full((64,), value), (64,))


def die_at(module: object, name: str, call: int, *, after: bool = False) -> None:
    """Make the ``call``-th call (from 1) of ``module.name`` end the process, before or after its work."""
    original: Callable = getattr(module, name)
    calls = 0

    def dying(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os._exit(KILLED)
        result = original(*arguments, **options)
        if calls == call:
            os._exit(KILLED)
        return result

    setattr(module, name, dying)


# Where a save of three shard files, a state and a manifest can be cut short; only the last leaves a step 200.
PHASES: dict[str, Callable[[], None]] = {
    "temporary directory made": lambda: die_at(writer, "_prepare", 1, after=True),
    "before the first shard": lambda: die_at(shards, "save_file", 1),
    "first shard written, not forced to disk": lambda: die_at(shards, "save_file", 1, after=True),
    "between shards": lambda: die_at(shards, "save_file", 3),
    "before the state": lambda: die_at(writer, "write_durably", 1),
    "state written": lambda: die_at(writer, "write_durably", 1, after=True),
    "before the manifest": lambda: die_at(writer, "write_durably", 2),
    "manifest written": lambda: die_at(writer, "write_durably", 2, after=True),
    "before the rename": lambda: die_at(os, "rename", 1),
    "after the rename": lambda: die_at(os, "rename", 1, after=True),
}


def save_and_die(directory: Path) -> None:
    """For each phase: a complete step 100, then a save of step 200 that dies there."""
    for index, arm in enumerate(PHASES.values()):
        run = directory / str(index)
        write_checkpoint(run, 100, pieces(1.0), {})
        child = os.fork()
        if child == 0:
            arm()
            write_checkpoint(run, 200, pieces(2.0), {}, max_shard_bytes=256)
            os._exit(0)  # reached only if the phase was never met; the exit status shows it
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != KILLED:
            raise SystemExit(f"phase {index} ended with status {status}, not {KILLED}")


def save_on_a_full_disk(directory: Path) -> None:
    """A limit on file size stands for a full disk: the writes themselves fail, not a replaced function."""
    write_checkpoint(directory, 100, pieces(1.0), {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    large = TensorPiece("large", "weight", torch.ones(100_000), (100_000,))
    try:
        write_checkpoint(directory, 200, [*pieces(2.0), large], {})
    except CheckpointError as error:
        print(error)


def collective_pieces(rank: int) -> Iterator[TensorPiece]:
    """Halves of each tensor; drawing one is a collective, as gathering under ZeRO is."""
    for index in range(6):
        total = torch.ones(1)
        dist.all_reduce(total)
        tensor = torch.full((2, 64), float(rank + 10 * index)) * total / 2
        yield TensorPiece(f"w{index}", "weight", tensor, (4, 64), 0, 2 * rank)


def two_ranks(directory: Path, rank: int) -> None:
    """Rank 1 fails once in a shard (rank 0 still gathers), rank 0 once in the state; then both save."""
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=2)
    run = directory / "checkpoints"
    write_checkpoint(run, 100, collective_pieces(rank), {"saved_by": rank})
    messages = []
    for failing_rank, module, name in ((1, shards, "save_file"), (0, writer, "write_durably")):
        original = getattr(module, name)
        if rank == failing_rank:

            def failing(*_: object, **__: object) -> None:
                raise OSError(28, "No space left on device")

            setattr(module, name, failing)
        try:
            write_checkpoint(run, 200, collective_pieces(rank), {}, max_shard_bytes=512)
        except CheckpointError as error:
            messages.append(str(error))
        setattr(module, name, original)
        messages.append(" ".join(sorted(entry.name for entry in run.iterdir())))
        dist.barrier()
    write_checkpoint(run, 200, collective_pieces(rank), {}, max_shard_bytes=512)
    (directory / f"messages-{rank}").write_text("\n".join(messages))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "alone":
        save_and_die(Path(sys.argv[2]) / "killed")
        save_on_a_full_disk(Path(sys.argv[2]) / "full")
    else:
        two_ranks(Path(sys.argv[2]), int(sys.argv[3]))
