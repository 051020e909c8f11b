"""The training loop."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass

from data.errors import DataError
from pretrain.config.schema import Config
from pretrain.errors import DivergedError
from pretrain.parallel.agreement import any_rank
from pretrain.rolling_back import rolls_back
from pretrain.signals import StopRequest
from pretrain.trainer import Trainer


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: steps that are done.
        stopped_by_signal: whether a signal ended it early, its state saved.
    """

    step: int
    stopped_by_signal: bool


def _is_due(every: int, step: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def train(config: Config, resume: str = "auto", process_ends: bool = False) -> Outcome:
    """Trains until ``train.steps`` or a signal; saves at the end either way.

    A checkpoint that is still being written when training ends is waited for, whatever ended it.

    Args:
        resume: see ``Trainer``.
        process_ends: whether the process ends with the run, so that signals that come afterwards are ignored.

    Raises:
        InputError, DataError: what was given does not fit together, or the data could not be read on; then the
            steps so far are saved.
        DivergedError: too many steps in a row had no finite gradient.
        TrainingError: a checkpoint could not be written: the last one, or any where ``train.checkpoint_mode`` is
            ``synchronous``.
    """
    trainer = Trainer(config, resume)
    with StopRequest(process_ends) as stop:
        while (outcome := _train(trainer, stop)) is None:
            # A rollback is a resume; what the trainer held, on the device too, must go before there is another.
            del trainer
            gc.collect()
            trainer = Trainer(config)
    return outcome


def _train(trainer: Trainer, stop: StopRequest) -> Outcome | None:
    """The same up to a rollback; None where the run is to start again from before a loss spike."""
    settings, position = trainer.config.train, trainer.position
    samples = trainer.config.observe.samples if trainer.config.observe else None
    with (
        contextlib.closing(trainer),
        trainer.watchdog,
        trainer.observer as observer,
        trainer.saver,
    ):
        if position.step >= settings.steps:
            observer.message(f"nothing to do: the run has all of its {settings.steps} steps")
        while position.step < settings.steps:
            try:
                micro_batches = trainer.read_step()
            except DataError:
                # The data may be mended, and what was computed so far must not be lost.
                trainer.save_what_is_new()
                raise
            trainer.train_step(micro_batches)
            if rolls_back(trainer):
                return None
            stopping = any_rank(stop.received is not None, trainer.topology.device)
            diverged = position.skipped_in_a_row >= settings.max_skipped_steps
            last = stopping or diverged or position.step == settings.steps
            if last:
                trainer.finish_saving()
            if _is_due(settings.evaluate_every, position.step, settings.steps) and not (stopping or diverged):
                trainer.evaluate()
            if samples and _is_due(samples.every, position.step, settings.steps) and not (stopping or diverged):
                trainer.sample()
            if last or _is_due(settings.checkpoint_every, position.step, settings.steps):
                trainer.save(wait=last)
            if diverged:
                raise DivergedError(
                    f"{position.skipped_in_a_row} steps in a row had no finite gradient "
                    f"(train.max_skipped_steps={settings.max_skipped_steps}); the state at step {position.step} "
                    f"is saved in {trainer.run.checkpoints}: lower optimizer.learning_rate or look at the data"
                )
            if stopping and position.step < settings.steps:
                observer.message(f"stopped by a signal after step {position.step}; --resume auto goes on")
                return Outcome(position.step, stopped_by_signal=True)
    return Outcome(position.step, stopped_by_signal=False)
