"""``bench checkpoint``: how long training waits for a checkpoint, and how long until it is complete; peers beside us.

As in ``bench train`` each round measures everyone once, in turns, and medians are printed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import multiprocessing

from pretrain.bench.checkpoint_rank import SaveTimings, measure_on_this_rank
from pretrain.bench.train import machine
from pretrain.config import parse_config
from pretrain.errors import InputError
from pretrain.plan import plan
from pretrain.plan.numbers import format_bytes, format_count

_MULTIPLES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_NUM_LAYERS = 12
_WIDTH_STEP = 32
# DeepSpeed's is the largest: weights, a second copy of them, and both moments.
_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class CheckpointBenchmark:
    """Everything measured.

    Attributes:
        parameters: of the model.
        rows: ours, synchronous and asynchronous, then the peers.
    """

    parameters: int
    ranks: int
    threads: int
    rows: tuple[SaveTimings, ...]

    def stall_ratio(self) -> float:
        """Median stall of our synchronous save over that of the asynchronous one."""
        synchronous, asynchronous = (statistics.median(row.stall) for row in self.rows[:2])
        return synchronous / asynchronous

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, every round's."""
        return {
            **machine(),
            "threads": self.threads,
            "parameters": self.parameters,
            "ranks": self.ranks,
            "stall_ratio": self.stall_ratio(),
            "rows": {
                row.name: {key: value for key, value in asdict(row).items() if key != "name"} for row in self.rows
            },
        }


def parse_count(text: str) -> int:
    """``200M`` -> 200,000,000.

    Raises:
        InputError: it is not a number with, if any, one of the letters k, M, B.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKMBG]?)", text.strip())
    count = round(float(match[1]) * _MULTIPLES[match[2]]) if match else 0
    if count < 1:
        raise InputError(f"--parameters {text}: expected a number of parameters, for instance 200M, 1.3B or 500k")
    return count


def _raw_config(hidden_size: int, ranks: int) -> dict[str, Any]:
    blocks = {"block": {"mixer": {"type": "mlstm", "num_heads": 4}, "channel": {"type": "swiglu"}}}
    return {
        "run": {"directory": "unused"},
        "model": {
            "vocab_size": 256,
            "hidden_size": hidden_size,
            "num_layers": _NUM_LAYERS,
            "layers": ["block"],
            "blocks": blocks,
        },
        "data": {
            "source": {"type": "standard_library"},
            "tokenizer": {"type": "bytes"},
            "sequence_length": 64,
        },
        "parallel": {"zero": 1, "data": ranks},
        "optimizer": {"learning_rate": 1e-4},
        "train": {"steps": 1, "global_batch_size": ranks, "micro_batch_size": 1, "device": "cpu"},
    }


def config_of(parameters: int, ranks: int) -> tuple[dict[str, Any], int]:
    """An xLSTM of about so many parameters, as an unparsed configuration, and how many it has."""

    def count(width: int) -> int:
        return plan(parse_config(_raw_config(width * _WIDTH_STEP, ranks), "bench checkpoint")).parameters

    # They grow with the width's square.
    low = 1
    while count(2 * low) <= parameters:
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    width = min((low, high), key=lambda candidate: abs(count(candidate) - parameters))
    return _raw_config(width * _WIDTH_STEP, ranks), count(width)


def _run_rank(
    rank: int, ranks: int, threads: int, raw: dict[str, Any], rounds: int, directory: str, quiet: bool
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(threads)
    store = dist.FileStore(str(Path(directory) / "rendezvous"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    say = Console().print if rank == 0 and not quiet else (lambda text: None)
    timings = measure_on_this_rank(raw, rounds, Path(directory), say)
    if rank == 0:
        (Path(directory) / "timings.json").write_text(json.dumps([asdict(row) for row in timings]))
    dist.barrier()
    dist.destroy_process_group()


def bench_checkpoint(
    parameters: int, ranks: int, rounds: int, directory: Path, say: Callable[[str], None] | None = print
) -> CheckpointBenchmark:
    """Measures in processes of their own.

    Args:
        directory: where the checkpoints are written; what is measured is its file system.
        say: takes lines of progress, which the processes print themselves then; None: nobody does.

    Raises:
        InputError: there is no such directory, or it has not room enough.
    """
    raw, actual = config_of(parameters, ranks)
    if not directory.is_dir():
        raise InputError(f"--directory {directory} is not a directory; give one on the file system to measure")
    needed, free = _BYTES_PER_PARAMETER * actual, shutil.disk_usage(directory).free
    if free < needed:
        raise InputError(
            f"--directory {directory} has {format_bytes(free)} free, but a checkpoint of {format_count(actual)} "
            f"parameters takes up to {format_bytes(needed)}; give another, or fewer --parameters"
        )
    threads = max(1, torch.get_num_threads() // ranks)
    if say is not None:
        say(f"an xLSTM of {format_count(actual)} parameters on {ranks} processes")
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=directory) as temporary:
        arguments = (ranks, threads, raw, rounds, temporary, say is None)
        multiprocessing.start_processes(_run_rank, arguments, nprocs=ranks, start_method="spawn")
        rows = [SaveTimings(**row) for row in json.loads((Path(temporary) / "timings.json").read_text())]
    return CheckpointBenchmark(actual, ranks, threads, tuple(rows))


def _spread(values: Sequence[float]) -> str:
    middle, low, high = (f"{value:.2f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} .. {high})"


def table(result: CheckpointBenchmark) -> Table:
    """The result, medians with the least and the most over the rounds."""
    drawn = Table(
        title=f"Saving {format_count(result.parameters)} parameters and both moments, {result.ranks} ranks, in seconds",
        caption="median (least .. most) over rounds; memory is the most of any round",
    )
    for heading in ("", "stall", "slower steps", "complete after", "on disk", "extra memory", "forced to disk"):
        drawn.add_column(heading, justify="right" if heading else "left")
    for row in result.rows:
        known = [extra for extra in row.extra_memory if extra is not None]
        drawn.add_row(
            row.name,
            _spread(row.stall),
            _spread(row.slower),
            _spread(row.complete),
            format_bytes(row.written[-1]),
            format_bytes(max(known)) if known else "not known",
            "yes" if row.durable else "no",
        )
    return drawn


def print_bench_checkpoint(parameters: str, ranks: int, rounds: int, directory: Path, as_json: bool = False) -> None:
    """Measures and prints the table, or JSON with every round."""
    console = Console()
    result = bench_checkpoint(parse_count(parameters), ranks, rounds, directory, None if as_json else console.print)
    if as_json:
        console.print_json(data=result.to_dict())
        return
    about = machine()
    console.print(f"{about['processor']}, {result.threads} threads a process, torch {about['torch']}")
    console.print(table(result))
    steps = statistics.median([step for row in result.rows for step in row.undisturbed_step])
    console.print(
        f"ours: the synchronous stall is {result.stall_ratio():.1f} times the asynchronous one; a step takes "
        f"{steps:.2f} s. Stall: training waits for the save. Slower steps: how much longer the steps took, all "
        f"together, until the checkpoint was complete. Each checkpoint was read back and holds the weights of when it "
        f"was saved; ours has checksums, and DeepSpeed's is not forced to disk."
    )
