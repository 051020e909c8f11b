"""A few steps under torch's profiler: a trace for each rank, the operations that take longest, the time of each phase.

The steps are those of a real run, by the same loop, from fresh weights; nothing of the configured run is touched. The
time of phases is taken on steps of their own, which the profiler does not slow down.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, record_function

from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.trainer import Trainer

READING, FORWARD, BACKWARD, OPTIMIZER, REST = (
    "reading data",
    "forward",
    "backward, sums over ranks",
    "optimizer step",
    "metrics",
)
PHASES = (READING, FORWARD, BACKWARD, OPTIMIZER, REST)
# What the loop tells its watchdog, and what that means here; the forward passes are told apart by hooks.
_BEGUN = {"reading data": READING, "forward and backward": BACKWARD, "optimizer step": OPTIMIZER, "metrics": REST}
# Before the names of phases in a trace, so that they are not taken for operations.
_MARK = "phase: "
_SCRATCH = "run-while-profiled"


@dataclass(frozen=True)
class Operation:
    """One kind of operation over all profiled steps of rank 0.

    Attributes:
        calls: how many.
        cpu_seconds, device_seconds: of its own, without the operations that it calls.
        share: of the time of all operations, on the device where there is one, else on the CPU.
    """

    name: str
    calls: int
    cpu_seconds: float
    device_seconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Attributes:
        phases: seconds a step of rank 0, by phase, without the profiler.
        operations: all of them, the longest first.
        steps: how many were timed, and as many more profiled.
        traces: one file for each rank.
    """

    device: str
    steps: int
    tokens_per_step: int
    phases: dict[str, float]
    operations: list[Operation]
    traces: list[str]

    def to_dict(self, operations: int) -> dict[str, Any]:
        """The same as JSON holds it, with so many operations."""
        return asdict(self) | {"operations": [asdict(operation) for operation in self.operations[:operations]]}


class PhaseClock:
    """Adds up the time of each phase; stands where the loop's watchdog does, which is told when each begins.

    Waits for the device at the borders of phases, or the time of a kernel would fall into a later one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phase: str | None = None
        self._mark: Any = None
        self._since = 0.0
        self._around: list[str | None] = []

    def begin(self, step: int, phase: str) -> None:
        """The loop begins a phase of a step."""
        self._enter(_BEGUN.get(phase, REST))

    def finish(self) -> None:
        """Nothing is going on any more."""
        self._enter(None)

    @contextmanager
    def forward_passes_of(self, module: torch.nn.Module) -> Iterator[None]:
        """Tells the forward passes of ``module`` from the rest of the phase in which they are."""

        def before(*_: object) -> None:
            self._around.append(self._phase)
            self._enter(FORWARD)

        def after(*_: object) -> None:
            self._enter(self._around.pop())

        hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, phase: str | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] += now - self._since
            self._mark.__exit__(None, None, None)
        self._phase, self._since = phase, now
        if phase is not None:
            self._mark = record_function(_MARK + phase)
            self._mark.__enter__()


def profile_run(config: Config, steps: int, warm_up: int, output: Path) -> Profile | None:
    """Profiles steps of a run; every rank of it calls this.

    Args:
        steps: that are timed, and then again that are profiled.
        warm_up: steps before them, in which kernels are compiled and memory is taken.
        output: directory for the traces, ``trace-rank-N.json``, to be opened by Perfetto or chrome://tracing.

    Returns:
        On rank 0 what was measured, on others None.

    Raises:
        InputError, DataError: what was given does not fit together, or ``output`` cannot be written.
    """
    scratch = output / _SCRATCH
    is_main = (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0
    if is_main:
        try:
            output.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            raise InputError(f"--out {output} cannot be written: {error.strerror or error}") from None
    try:
        # The tables may be read by a program; how the run goes on is for whoever watches.
        with redirect_stdout(sys.stderr):
            return _profile(_as_scratch(config, scratch, warm_up + 2 * steps), steps, warm_up, output)
    finally:
        if is_main:
            shutil.rmtree(scratch, ignore_errors=True)


def _as_scratch(config: Config, directory: Path, steps: int) -> Config:
    """The same run elsewhere: nothing is sent or saved, and there are steps enough."""
    train = config.train.model_copy(update={"steps": max(steps, config.train.steps)})
    run = config.run.model_copy(update={"directory": str(directory)})
    return config.model_copy(update={"run": run, "train": train, "wandb": None, "tensorboard": None})


def _profile(config: Config, steps: int, warm_up: int, output: Path) -> Profile | None:
    trainer = Trainer(config, resume="never")
    try:
        device, rank = trainer.topology.device, trainer.topology.rank
        with trainer.observer, trainer.saver:
            _train(trainer, PhaseClock(device), warm_up)
            clock = PhaseClock(device)
            _train(trainer, clock, steps)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            with torch.profiler.profile(activities=activities) as profiler:
                _train(trainer, PhaseClock(device), steps)
        trace = output / f"trace-rank-{rank}.json"
        temporary = trace.with_name(trace.name + ".tmp")
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, trace)
        dist.barrier()
        if rank != 0:
            return None
        return Profile(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            steps=steps,
            tokens_per_step=config.train.global_batch_size * config.data.sequence_length,
            phases={phase: seconds / steps for phase, seconds in clock.seconds.items()},
            operations=operations_of(profiler, device.type == "cuda"),
            traces=[str(output / f"trace-rank-{other}.json") for other in range(trainer.topology.world_size)],
        )
    finally:
        trainer.close()


def _train(trainer: Trainer, clock: PhaseClock, steps: int) -> None:
    trainer.watchdog = clock
    with clock.forward_passes_of(trainer.engine.decoder):
        for _ in range(steps):
            trainer.train_step(trainer.read_step())
    clock.finish()


def operations_of(profiler: torch.profiler.profile, on_device: bool) -> list[Operation]:
    """The operations of a profile that has ended, those first that take longest by themselves."""
    events = [event for event in profiler.key_averages() if not event.key.startswith((_MARK, "ProfilerStep"))]
    times = {id(event): (event.self_cpu_time_total / 1e6, event.self_device_time_total / 1e6) for event in events}
    total = sum(time[on_device] for time in times.values())
    return sorted(
        (
            Operation(event.key, event.count, *times[id(event)], times[id(event)][on_device] / max(total, 1e-12))
            for event in events
        ),
        key=lambda operation: -operation.share,
    )
