"""Programs that run on every rank of a pool of workers."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.config import parse_config
from pretrain.errors import InputError
from pretrain.parallel.schedule import BatchLoss
from pretrain.train import train


def run_training(raw: dict[str, Any], resume: str = "auto") -> tuple[int, bool]:
    """Trains; returns the last step and whether a signal ended it."""
    outcome = train(parse_config(raw, "test"), resume)
    return outcome.step, outcome.stopped_by_signal


def run_refused(raw: dict[str, Any], resume: str = "auto") -> str:
    """Says why a run does not start; fails if it does."""
    try:
        train(parse_config(raw, "test"), resume)
    except InputError as error:
        return str(error)
    raise AssertionError("the run started")


def run_with_broken_states(raw: dict[str, Any], broken_step: int, broken_rank: int) -> None:
    """Trains while one row of one rank ends a step (counted from 1) with a state that is not finite."""
    import torch.distributed as dist

    from pretrain.models.states_between_steps import StatesBetweenSteps

    original = StatesBetweenSteps.take
    begun = 0

    def breaking(self: StatesBetweenSteps, final: dict[str, dict[str, torch.Tensor]]) -> None:
        nonlocal begun
        begun += self._is_training and not self._new
        if begun == broken_step and dist.get_rank() == broken_rank:
            layer, state = next(iter(final.items()))
            name, tensor = next(iter(state.items()))
            broken = tensor.detach().clone()
            broken[-1] = float("inf")
            final = final | {layer: state | {name: broken}}
        original(self, final)

    StatesBetweenSteps.take = breaking
    try:
        train(parse_config(raw, "test"))
    finally:
        StatesBetweenSteps.take = original


def run_with_broken_gradients(
    raw: dict[str, Any], broken_steps: list[int], broken_rank: int, value: str = "nan"
) -> str | None:
    """Trains while one rank has ``nan`` or ``inf`` among its gradients in some steps (counted from 1).

    Returns:
        What ended it, if anything.
    """
    import torch.distributed as dist

    from pretrain import trainer as module
    from pretrain.errors import TrainingError

    original = module.run_schedule
    calls = 0

    def breaking(model: Any, decoder: Any, batches: Any, device: torch.device, **options: Any) -> BatchLoss:
        nonlocal calls
        calls += 1
        handle = None
        if calls in broken_steps and dist.get_rank() == broken_rank:
            parameter = next(decoder.layers.children()).mixer.input_gate_bias
            handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, float(value)))
        try:
            return original(model, decoder, batches, device, **options)
        finally:
            if handle is not None:
                handle.remove()

    module.run_schedule = breaking
    try:
        train(parse_config(raw, "test"))
    except TrainingError as error:
        return str(error)
    finally:
        module.run_schedule = original
    return None


def run_cut_in_a_save(raw: dict[str, Any], resume: str = "auto") -> None:
    """Trains until the first shard of the first checkpoint is written, and leaves there what kill -9 would."""
    from pretrain.checkpoint import shards

    class Killed(BaseException):
        """Nothing that a save would clean up after."""

    original = shards.save_file

    def cut(*arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        raise Killed

    shards.save_file = cut
    try:
        train(parse_config(raw, "test"), resume)
    except Killed:
        return
    finally:
        shards.save_file = original
    raise AssertionError("nothing was saved")


def run_with_poison(raw: dict[str, Any], poisoned: list[int], resume: str = "auto") -> tuple[list[list[int]], str]:
    """Trains while some samples are of one byte alone, and raise the loss three times.

    Returns:
        This rank's samples, step by step, in the order in which they were trained on, and what is said of the run.
    """
    import contextlib
    import dataclasses
    import io

    from data.order import rank_share, sample_indices
    from pretrain import trainer as module
    from pretrain.training_data import TrainingData

    schedule, read_batch = module.run_schedule, TrainingData._read
    mark, trained = 7, []
    # Batches stay alive in it, so that no other takes the identity of one.
    made: dict[int, tuple[Any, list[int]]] = {}

    def poisoning(self: TrainingData, first: int) -> list[Any]:
        train, topology = self.config.train, self._topology
        indices = sample_indices(first, train.global_batch_size, self.left_out)
        shares = rank_share(indices, train.micro_batch_size, topology.data_rank, topology.data_size)
        batches = []
        for share, batch in zip(shares, read_batch(self, first), strict=True):
            tokens = batch.tokens.clone()
            tokens[[place for place, index in enumerate(share) if index in poisoned]] = mark
            batches.append(dataclasses.replace(batch, tokens=tokens))
            made[id(batches[-1])] = batches[-1], share
        return batches

    def raising(model: Any, decoder: Any, batches: Any, device: torch.device, **options: Any) -> BatchLoss:
        loss = schedule(model, decoder, batches, device, **options)
        is_poisoned = any(bool((batch.tokens == mark).all(1).any()) for batch in batches)
        return dataclasses.replace(loss, nats=3 * loss.nats) if is_poisoned and options["train"] else loss

    def recording(self: module.Trainer, micro_batches: list[Any]) -> None:
        trained.append([index for batch in micro_batches for index in made[id(batch)][1]])
        train_step(self, micro_batches)

    train_step = module.Trainer.train_step
    module.run_schedule, TrainingData._read, module.Trainer.train_step = raising, poisoning, recording
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            train(parse_config(raw, "test"), resume)
    finally:
        module.run_schedule, TrainingData._read, module.Trainer.train_step = schedule, read_batch, train_step
    return trained, output.getvalue()


def run_without(raw: dict[str, Any], left_out: list[tuple[int, int]]) -> None:
    """Trains a run that never has some samples."""
    from pretrain import trainer as module

    original = module.finish_rollbacks
    module.finish_rollbacks = lambda *paths: left_out
    try:
        train(parse_config(raw, "test"))
    finally:
        module.finish_rollbacks = original
