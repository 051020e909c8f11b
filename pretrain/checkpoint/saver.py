"""When a run's checkpoints are written, in the background or not, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pretrain.checkpoint.background import BackgroundWriter, SaveOutcome
from pretrain.checkpoint.directory import prune_checkpoints
from pretrain.checkpoint.training import TrainingPosition, training_pieces, training_state
from pretrain.checkpoint.writer import write_checkpoint
from pretrain.config.schema import Config
from pretrain.parallel.agreement import any_rank, on_main_rank
from pretrain.parallel.engine import Engine
from pretrain.parallel.topology import Topology


class CheckpointSaver:
    """Saves one run, as ``train.checkpoint_mode`` says.

    Entered, it waits at its end for the save in flight, whatever ended training, but not where someone interrupts the
    process at once.

    Args:
        resumed_from: the step of the checkpoint that the run goes on from, if any.
        message: takes lines for whoever watches.
        failed: takes what went wrong with a save that training does not end for.

    Attributes:
        saved_step: the newest step that is known to be saved.
    """

    def __init__(
        self,
        run_checkpoints: Path,
        engine: Engine,
        topology: Topology,
        config: Config,
        resumed_from: int | None,
        message: Callable[[str], None],
        failed: Callable[[str], None],
    ) -> None:
        self.run_checkpoints = run_checkpoints
        self.engine, self.topology, self.config = engine, topology, config
        self.resumed_from = resumed_from
        self.saved_step = resumed_from or 0
        self.message, self.failed = message, failed
        self.background: BackgroundWriter | None = None
        train = config.train
        if train.checkpoint_mode == "asynchronous":
            self.background = BackgroundWriter(run_checkpoints, train.keep_last, train.keep_every, topology.device)

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.wait()

    def save(self, position: TrainingPosition, data_state: Mapping[str, Any], wait: bool) -> None:
        """Writes a checkpoint of ``position``, or begins to; every rank calls it. Waits for the save before it.

        ``data_state`` is what a later start needs to go on with the same data, as JSON holds it.

        Args:
            wait: until it is written: training has nothing to do meanwhile, or must not go on without it.

        Raises:
            TrainingError: on every rank, where one of them could not write and training waits for it (``wait``, or
                ``train.checkpoint_mode: synchronous``); earlier checkpoints are untouched.
        """
        began = time.perf_counter()
        if self.background is not None and self.background.is_writing and not wait:
            self.message(f"step {position.step}: waiting for the checkpoint before this one, which is still written")
        self.wait()
        if self.background is not None and wait:
            # It is written piece by piece, without copies of all: their memory may go.
            self.background.copies.free()
        pieces = training_pieces(self.engine, self.topology)
        state = training_state(self.config, position, data_state)
        if self.background is not None and not wait:
            self.background.start(position.step, pieces, state, self.resumed_from, began)
            return
        path = write_checkpoint(self.run_checkpoints, position.step, pieces, state, resumed_from=self.resumed_from)
        self.saved_step = position.step
        train = self.config.train
        on_main_rank(lambda: prune_checkpoints(self.run_checkpoints, train.keep_last, train.keep_every) and None)
        self.message(f"saved {path}")

    def wait(self) -> None:
        """Waits for the save in flight, if any, and says how it ended."""
        self._tell(self.background.take_outcome(wait=True) if self.background else None)

    def tell_what_ended(self) -> None:
        """Says how the save in flight ended, if it has."""
        self._tell(self.background.take_outcome(wait=False) if self.background else None)

    def holds(self, step: int) -> bool:
        """Whether every rank knows ``step`` to be saved; waits for the save in flight. Every rank calls it."""
        self.wait()
        return not any_rank(self.saved_step < step, self.topology.device)

    def _tell(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        if outcome.path is None:
            self.failed(outcome.error)
            return
        self.saved_step = outcome.step
        self.message(
            f"saved {outcome.path} (training waited {outcome.stalled:.2f} s, complete after {outcome.seconds:.2f} s)"
        )
