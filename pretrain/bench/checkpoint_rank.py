"""One process of ``bench checkpoint``: trains, saves in every way in turn, and looks at what was saved."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.batch import Batch
from pretrain.bench.checkpoint_contestants import SavingContestant, contestants
from pretrain.config import parse_config
from pretrain.errors import CheckError
from pretrain.models.parameters import initialise_weights
from pretrain.parallel.build import build_engine, build_model
from pretrain.parallel.schedule import run_schedule
from pretrain.parallel.topology import build_topology

STEPS_BEFORE = 2


@dataclass
class SaveTimings:
    """Of one way to save, one entry a round; seconds are those of the slowest rank, bytes of all ranks together.

    Attributes:
        name, durable: see ``SavingContestant``.
        stall: seconds that training waited for the save.
        slower: seconds that the steps took longer, all together, while a save was written beside them.
        complete: seconds from the beginning of the save until its checkpoint was complete.
        steps: that were taken meanwhile, or one after it.
        undisturbed_step: seconds of a step before the save, the median.
        extra_memory: host memory at its peak above that of training without a save; None where it cannot be known.
        written: bytes of the checkpoint.
    """

    name: str
    durable: bool
    stall: list[float] = field(default_factory=list)
    slower: list[float] = field(default_factory=list)
    complete: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    undisturbed_step: list[float] = field(default_factory=list)
    extra_memory: list[int | None] = field(default_factory=list)
    written: list[int] = field(default_factory=list)


class MemoryPeak:
    """The most memory that this process has had resident since :meth:`restart`, as Linux counts it."""

    def restart(self) -> None:
        """Forgets what was before."""
        self.known = True
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.known = False

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if not self.known:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


class TrainingProcess:
    """A ZeRO-1 engine on random tokens; collective over the job's processes.

    Args:
        raw: configuration of the run, unparsed.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        self.config = parse_config(raw, "bench checkpoint")
        self.topology = build_topology(self.config)
        model = build_model(self.config)
        initialise_weights(model, seed=0)
        self.engine = build_engine(model, self.config, self.topology)
        self.generator = torch.Generator().manual_seed(self.topology.rank)
        self.done = 0

    def _batch(self) -> Batch:
        shape = (self.config.train.micro_batch_size, self.config.data.sequence_length)
        vocabulary = self.config.model.vocab_size
        tokens, labels = (torch.randint(0, vocabulary, shape, generator=self.generator) for _ in range(2))
        starts = torch.zeros(shape, dtype=torch.bool)
        starts[:, 0] = True
        count = shape[0] * shape[1] * self.topology.data_size
        return Batch(tokens, labels, starts, label_bytes=count, label_count=count)

    def step(self) -> float:
        """Trains one step; seconds."""
        batch = self._batch()
        began = time.perf_counter()
        with self.engine.accumulate():
            run_schedule(self.engine.model, self.engine.decoder, [batch], self.topology.device, train=True)
        result = self.engine.step(1e-4)
        if not result.applied:
            raise CheckError("a step of the benchmark was skipped: its gradient is not finite")
        self.done += 1
        return time.perf_counter() - began


def measure_on_this_rank(
    raw: dict[str, Any], rounds: int, directory: Path, say: Callable[[str], None]
) -> list[SaveTimings]:
    """Saves in every way once a round, after a round for warming up that counts for memory alone.

    Args:
        raw: configuration of the run, unparsed.
        directory: on the file system that is measured; it is empty again at the end.
        say: takes lines of progress.

    Raises:
        CheckError: a checkpoint does not hold the weights of when it was saved.
    """
    training = TrainingProcess(raw)
    for _ in range(STEPS_BEFORE):
        training.step()
    ways = contestants(training.engine, training.topology, training.config)
    results = [SaveTimings(way.name, way.durable) for way in ways]
    for index in range(rounds + 1):
        for way, timings in zip(ways, results, strict=True):
            _save_once(training, way, timings, directory / "save", keep=index > 0)
            say(f"round {index} of {rounds}: {way.name}" + (f", stall {timings.stall[-1]:.2f} s" if index else ""))
    return results


def _save_once(
    training: TrainingProcess, way: SavingContestant, timings: SaveTimings, directory: Path, keep: bool
) -> None:
    peak = MemoryPeak()
    peak.restart()
    before = sorted(training.step() for _ in range(STEPS_BEFORE))
    undisturbed = _slowest(before[len(before) // 2])
    peak_without = peak.read()
    step, is_main = training.done, training.topology.is_main
    parameters = training.engine.parameters
    expected = {name: parameter.detach().clone() for name, parameter in parameters.items()} if is_main else {}
    # No one shall wait for what another left to be written.
    _on_main_rank_alone(is_main, os.sync)
    peak.restart()
    held = sum(tensor.nbytes for tensor in expected.values())

    began = time.perf_counter()
    way.begin(directory, step)
    stall = _slowest(time.perf_counter() - began)
    slower, steps, running = 0.0, 0, True
    while running:
        slower += training.step() - undisturbed
        steps += 1
        running = _slowest(float(not way.is_complete())) > 0
    completed = way.finish()
    complete = _slowest(stall if completed is None else completed - began)
    peak_with = peak.read()

    _on_main_rank_alone(is_main, lambda: _check(way, directory, step, expected))
    written = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    dist.barrier()
    _on_main_rank_alone(is_main, lambda: shutil.rmtree(directory))
    extra = None if peak_with is None or peak_without is None else max(0, peak_with - peak_without - held)
    timings.extra_memory.append(_total(extra))
    if keep:
        timings.stall.append(stall)
        timings.slower.append(_slowest(slower))
        timings.complete.append(complete)
        timings.steps.append(steps)
        timings.undisturbed_step.append(undisturbed)
        timings.written.append(written)


def _check(way: SavingContestant, directory: Path, step: int, expected: dict[str, torch.Tensor]) -> None:
    stored = way.read(directory, step, list(expected))
    wrong = [name for name, tensor in expected.items() if not torch.equal(stored[name], tensor)]
    if wrong:
        raise CheckError(f"{way.name}: {len(wrong)} weights are not those that were saved, {wrong[0]} for instance")


def _on_main_rank_alone(is_main: bool, function: Callable[[], None]) -> None:
    """Others wait meanwhile; where it fails, they end with the job."""
    if is_main:
        function()
    dist.barrier()


def _slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def _total(count: int | None) -> int | None:
    """Over all ranks; None where one of them does not know."""
    values: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, count)
    return None if None in values else sum(values)
