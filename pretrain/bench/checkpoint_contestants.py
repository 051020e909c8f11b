"""What ``bench checkpoint`` times: our saves, DeepSpeed's own, and torch's distributed checkpoint, of one state.

All save the weights and both moments of the same ZeRO-1 engine. Peers get what suits them best: tensors as they lie in
memory, nothing gathered, and memory that is kept from save to save where they can.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from pretrain.checkpoint.background import BackgroundWriter
from pretrain.checkpoint.format import CheckpointError
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.training import TrainingPosition, training_pieces, training_state
from pretrain.checkpoint.writer import write_checkpoint
from pretrain.config.schema import Config
from pretrain.parallel.engine import MOMENTS
from pretrain.parallel.topology import Topology

if TYPE_CHECKING:
    # DeepSpeed reads the environment when it is imported, and the topology must have set it.
    from pretrain.parallel.zero import ZeroEngine


class SavingContestant(ABC):
    """One way to save; every rank has one.

    Attributes:
        name: of the row.
        durable: whether a complete checkpoint is forced to disk, and not only handed to the operating system.
    """

    name: str
    durable: bool

    @abstractmethod
    def begin(self, directory: Path, step: int) -> None:
        """Saves into a new directory; returns when training may go on."""

    def is_complete(self) -> bool:
        """Whether the save is complete on this rank."""
        return True

    def finish(self) -> float | None:
        """Waits for it; ``time.perf_counter()`` of when it was complete, None where that was before ``begin`` ended."""
        return None

    @abstractmethod
    def read(self, directory: Path, step: int, names: list[str]) -> dict[str, Tensor]:
        """The saved weights, whole; called on rank 0 alone."""


class OurSave(SavingContestant):
    """``train.checkpoint_mode: synchronous``."""

    name, durable = "ours, synchronous", True

    def __init__(self, engine: ZeroEngine, topology: Topology, config: Config) -> None:
        self.engine, self.topology, self.config = engine, topology, config

    def _state(self, step: int) -> dict[str, Any]:
        return training_state(self.config, TrainingPosition(step=step), {})

    def begin(self, directory: Path, step: int) -> None:
        write_checkpoint(directory, step, training_pieces(self.engine, self.topology), self._state(step))

    def read(self, directory: Path, step: int, names: list[str]) -> dict[str, Tensor]:
        with CheckpointReader(directory / f"step-{step:08}") as reader:
            reader.verify()
            return {name: reader.read(name) for name in names}


class OurBackgroundSave(OurSave):
    """``train.checkpoint_mode: asynchronous``."""

    name = "ours, asynchronous"

    def __init__(self, engine: ZeroEngine, topology: Topology, config: Config) -> None:
        super().__init__(engine, topology, config)
        self.writer: BackgroundWriter | None = None

    def begin(self, directory: Path, step: int) -> None:
        self._began = time.perf_counter()
        # Each save goes to a directory of its own, as no run's do; what a run keeps from save to save is kept.
        copies = None if self.writer is None else self.writer.copies
        self.writer = BackgroundWriter(directory, 1, None, self.topology.device, copies)
        pieces = training_pieces(self.engine, self.topology)
        self.writer.start(step, pieces, self._state(step), None, self._began)

    def is_complete(self) -> bool:
        return not self.writer.is_writing

    def finish(self) -> float:
        outcome = self.writer.take_outcome(wait=True)
        if outcome.error is not None:
            raise CheckpointError(outcome.error)
        return self._began + outcome.seconds


class DeepSpeedSave(SavingContestant):
    """``DeepSpeedEngine.save_checkpoint``: torch files of each rank, 16 bytes a parameter, one layout only."""

    name, durable = "DeepSpeed save_checkpoint", False

    def __init__(self, engine: ZeroEngine) -> None:
        self.engine = engine.engine

    def begin(self, directory: Path, step: int) -> None:
        self.engine.save_checkpoint(str(directory), tag=f"step-{step}")

    def read(self, directory: Path, step: int, names: list[str]) -> dict[str, Tensor]:
        # Written by this very process, and DeepSpeed's files hold objects of its own.
        path = directory / f"step-{step}" / "mp_rank_00_model_states.pt"
        stored = torch.load(path, map_location="cpu", weights_only=False)["module"]
        return {name: stored[name] for name in names}


class TorchSave(SavingContestant):
    """``torch.distributed.checkpoint.save``: weights, and each rank's flat partition of the moments."""

    name, durable = "torch DCP save", True

    def __init__(self, engine: ZeroEngine) -> None:
        self.engine = engine

    def _state_dict(self) -> dict[str, Tensor]:
        rank, states = dist.get_rank(), self.engine.optimizer.state
        tensors = {name: parameter.detach() for name, parameter in self.engine.parameters.items()}
        for index, partition in enumerate(self.engine.zero.single_partition_of_fp32_groups):
            tensors |= {f"rank-{rank}|{index}|{kind}": states[partition][kind] for kind in MOMENTS}
        return tensors

    def begin(self, directory: Path, step: int) -> None:
        distributed_checkpoint.save(self._state_dict(), checkpoint_id=directory)

    def read(self, directory: Path, step: int, names: list[str]) -> dict[str, Tensor]:
        stored = {name: torch.full_like(self.engine.parameters[name].detach(), float("nan")) for name in names}
        distributed_checkpoint.load(stored, checkpoint_id=directory, no_dist=True)
        return stored


class TorchBackgroundSave(TorchSave):
    """``torch.distributed.checkpoint.async_save`` with a thread, a gloo group and copies of its own."""

    name = "torch DCP async_save"

    def __init__(self, engine: ZeroEngine) -> None:
        super().__init__(engine)
        self.group = dist.new_group(backend="gloo")
        # On the CPU it can neither pin memory nor copy in the background.
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.complete: float | None = None

    def begin(self, directory: Path, step: int) -> None:
        self.complete = None
        self.future: Future = distributed_checkpoint.async_save(
            self._state_dict(), checkpoint_id=directory, process_group=self.group, async_stager=self.stager
        )
        self.future.add_done_callback(self._note_time)

    def _note_time(self, future: Future) -> None:
        self.complete = time.perf_counter()

    def is_complete(self) -> bool:
        return self.complete is not None

    def finish(self) -> float:
        self.future.result()
        while self.complete is None:
            # Between the result and the callback there is but a moment.
            time.sleep(0.001)
        return self.complete


def contestants(engine: ZeroEngine, topology: Topology, config: Config) -> list[SavingContestant]:
    """All of them, ours first."""
    return [
        OurSave(engine, topology, config),
        OurBackgroundSave(engine, topology, config),
        DeepSpeedSave(engine),
        TorchSave(engine),
        TorchBackgroundSave(engine),
    ]
