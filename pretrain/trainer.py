"""One run: what the loop needs, opened in the order in which it can fail, and what a step of it is."""

from __future__ import annotations

from pathlib import Path

import torch

from data.batch import Batch
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.recurrent_states import restore_states
from pretrain.checkpoint.rollback import finish_rollbacks
from pretrain.checkpoint.saver import CheckpointSaver
from pretrain.checkpoint.training import (
    TrainingPosition,
    begins_a_run,
    read_moments,
    read_position,
    restore_random_state,
)
from pretrain.config.schema import Config
from pretrain.evaluate.held_out import HeldOutLoss, evaluate_held_out
from pretrain.models.block import metric_reductions
from pretrain.models.loading import read_weights
from pretrain.models.parameters import initialise_weights
from pretrain.observe.memory import peak_memory_bytes
from pretrain.observe.observer import Observer
from pretrain.observe.run_directory import RunDirectory
from pretrain.observe.slow_ranks import SlowRanks
from pretrain.observe.spikes import Spike, SpikeDetector
from pretrain.observe.step_figures import StepFigures
from pretrain.observe.watchdog import Watchdog
from pretrain.optimizer.learning_rate import learning_rate
from pretrain.parallel.agreement import any_rank, combine_ranks, on_every_rank, on_main_rank, together
from pretrain.parallel.build import build_engine, build_model
from pretrain.parallel.engine import Engine, StepResult
from pretrain.parallel.schedule import BatchLoss, run_schedule
from pretrain.parallel.topology import Topology, build_topology
from pretrain.plan import device_peak_flops_per_second
from pretrain.samples import sample_texts
from pretrain.starting_point import choose_checkpoint
from pretrain.training_data import TrainingData


class Trainer:
    """One run on this rank: everything that the loop needs, built in the order in which it can fail."""

    def __init__(self, config: Config, resume: str = "auto"):
        """Opens the run.

        Args:
            resume: ``auto`` goes on from the newest complete checkpoint, or else from what the run began with;
                ``never`` starts anew; any other text is the path of a checkpoint to start from.

        Raises:
            InputError, DataError: what was given does not fit together; nothing has been computed yet.
        """
        self.config = config
        # Before the processes join: preparing data may take longer than a collective waits. Where there is a cache
        # one process fills it and the others wait for its lock.
        self.data = TrainingData(config)
        self.topology: Topology = build_topology(config)
        self.data.share_among(self.topology)
        self.run = RunDirectory(Path(config.run.directory))
        rank, size = self.topology.rank, self.topology.world_size
        self.slow_ranks = SlowRanks(config, self.topology)
        self.spikes = SpikeDetector(config.train.spikes) if config.train.spikes else None
        self.spike: Spike | None = None
        self.watchdog = Watchdog(self.run.path, rank, size, config.train.hang_seconds)
        try:
            self._open(resume)
        except BaseException:
            self.close()
            raise

    def _open(self, resume: str) -> None:
        config = self.config
        self.data.left_out = on_main_rank(lambda: finish_rollbacks(self.run.path, self.run.checkpoints))
        start_from = on_main_rank(lambda: choose_checkpoint(self.run, self.data.opened, config, resume))
        changed = on_main_rank(lambda: self.run.prepare(config, resume, start_from))

        model = build_model(config)
        begins = False
        if start_from is None:
            initialise_weights(model, config.train.seed)
            self.position, resumed_from = TrainingPosition(), None
            self.engine: Engine = build_engine(model, config, self.topology)
        else:
            with CheckpointReader(start_from) as reader:
                begins = begins_a_run(reader)
                if begins:
                    self._begin(model, reader)
                else:
                    self._resume(model, reader)
            resumed_from = None if begins else self.position.step
        self.figures = StepFigures(config.observe, self.engine, self.topology)
        peak = _peak_flops_per_second(config, self.topology)
        self.observer = Observer(config, self.run, self.position.step, self.topology.is_main, peak)
        on_main_rank(self.observer.open)
        self.saver = CheckpointSaver(
            self.run.checkpoints,
            self.engine,
            self.topology,
            config,
            resumed_from,
            message=self.observer.message,
            failed=self.observer.checkpoint_failed,
        )
        self._announce(start_from, changed)
        if begins:
            # Or a run that ends before its first checkpoint would begin again with fresh weights.
            self.save(wait=True)

    def _begin(self, model: object, reader: CheckpointReader) -> None:
        """Starts with imported weights."""
        self.position = TrainingPosition()
        on_every_rank(lambda: read_weights(model, reader))
        self.engine = build_engine(model, self.config, self.topology)

    def _resume(self, model: object, reader: CheckpointReader) -> None:
        self.position = read_position(reader)
        self.data.go_on(reader.state, self.position.samples)
        if self.spikes is not None:
            self.spikes = SpikeDetector(self.config.train.spikes, reader.state.get("recent_losses", []))
        on_every_rank(lambda: read_weights(model, reader))
        restore_random_state(reader)
        self.engine = build_engine(model, self.config, self.topology)
        on_every_rank(lambda: restore_states(model, reader, self.config, self.topology))
        if self.position.updates > 0:
            self.engine.write_moments(read_moments(reader, self.engine), self.position.updates)

    def _announce(self, start_from: Path | None, changed: dict[str, tuple]) -> None:
        steps = self.config.train.steps
        for key, (before, now) in changed.items():
            self.observer.message(f"changed since the run began: {key} {before} -> {now}")
        for line in self.data.description():
            self.observer.message(line)
        if start_from is not None:
            began = "resumed from" if self.position.step else "begun with the weights of"
            self.observer.message(f"{began} {start_from} at step {self.position.step} of {steps}")

    def close(self) -> None:
        """Ends what reads in the background, and lets another job have the run directory."""
        self.data.close()
        self.run.release()

    def read_step(self) -> list[Batch]:
        """The next step's micro-batches; those of the step after it are read meanwhile.

        Raises:
            DataError: on every rank, where one of them could not read its part; the position stays where it is.
        """
        position = self.position
        self.watchdog.begin(position.step + 1, "reading data")
        self.observer.start_step()
        is_last = position.step + 1 >= self.config.train.steps

        def read() -> list[Batch]:
            with self.slow_ranks.measure("reading data"):
                return self.data.take(position.samples, is_last)

        return together(read, self.topology.device)

    def train_step(self, micro_batches: list[Batch]) -> None:
        """Updates the weights with what :meth:`read_step` has read, and moves the position on."""
        config, topology, position = self.config, self.topology, self.position
        self.watchdog.begin(position.step + 1, "forward and backward")
        # What an evaluation left behind.
        self.engine.decoder.take_metrics()
        self.figures.begin(position.step + 1)
        with self.engine.accumulate():
            loss: BatchLoss = run_schedule(
                self.engine.model,
                self.engine.decoder,
                micro_batches,
                topology.device,
                train=True,
                passes=self.slow_ranks.measure("forward and backward"),
            )
        self.watchdog.begin(position.step + 1, "optimizer step")
        rate = learning_rate(config, position.step)
        self.figures.before_update()
        result: StepResult = self.engine.step(rate)
        if topology.device.type == "cuda":
            # Or the clock stops before the update and ZeRO's gathering of the weights.
            torch.cuda.synchronize()
        self.watchdog.begin(position.step + 1, "metrics")

        tokens = config.train.global_batch_size * config.data.sequence_length
        position.step += 1
        position.samples = self.data.behind(position.samples)
        position.tokens += tokens
        position.skipped_steps += not result.applied
        position.skipped_in_a_row = 0 if result.applied else position.skipped_in_a_row + 1
        further = self._mixer_metrics() | self.engine.decoder.take_loss_terms(loss.labels)
        further |= {f"epochs_{name}": count for name, count in self.data.epochs(position.samples).items()}
        further |= self.figures.after_update()
        self.spike = self.spikes.take(loss.nats_per_token) if self.spikes else None
        further |= {"spike": True} if self.spike else {}
        length = micro_batches[0].tokens.shape[1]
        self.saver.tell_what_ended()
        self.observer.finish_step(loss, result, rate, tokens, position, length, further)
        if not result.applied:
            self.observer.message(
                f"step {position.step}: the gradient is not finite; the step was skipped "
                f"({position.skipped_steps} so far, {position.skipped_in_a_row} in a row)"
            )
        self._keep_states(result.applied)
        for sentence in self.slow_ranks.finish_step():
            self.observer.message(f"step {position.step}: {sentence}")

    def _keep_states(self, applied: bool) -> None:
        """Rows of the next step go on with the states of this one's; of one that was skipped, with those before it."""
        between = self.engine.decoder.between_steps
        if between is None:
            return
        finite = not any_rank(applied and not between.are_finite(), self.topology.device)
        between.finish(keep=applied and finite)
        if not finite:
            self.observer.message(
                f"step {self.position.step}: recurrent states are not finite; rows go on with those of before the step"
            )

    def _mixer_metrics(self) -> dict[str, float]:
        reductions = metric_reductions(self.config.model) | {"peak_memory_bytes": "max"}
        device = self.topology.device
        figures = self.engine.decoder.take_metrics() | {"peak_memory_bytes": peak_memory_bytes(device)}
        return combine_ranks(figures, reductions, device)

    def evaluate(self) -> HeldOutLoss:
        """Loss on held-out samples, of a mixture by source too, recorded with the last step."""
        self.watchdog.begin(self.position.step, "evaluation")
        loss = evaluate_held_out(
            self.engine.model,
            self.engine.decoder,
            self.data.opened.held_out,
            self.config.train.evaluate_samples,
            self.config.train.micro_batch_size,
            self.topology,
        )
        self.observer.evaluated(self.position.step, loss.whole, loss.sources)
        return loss

    def sample(self) -> None:
        """What the model writes now behind each prompt of ``observe.samples``, recorded with the last step."""
        settings, step = self.config.observe.samples, self.position.step
        self.watchdog.begin(step, "samples")
        texts = sample_texts(self.engine, self.data.opened.tokenizer, settings, self.config.train.seed)
        if texts is None:
            self.observer.message(f"step {step}: no samples, because the model's logits are not finite")
        else:
            self.observer.sampled(step, settings.prompts, texts)

    def save(self, wait: bool) -> None:
        """Writes a checkpoint, or begins to, and removes those that ``keep_last`` and ``keep_every`` do not keep.

        Args:
            wait: until it is written.
        """
        self.watchdog.begin(self.position.step, "saving")
        self.observer.sync()
        state = self.data.state(self.position.samples)
        if self.spikes is not None:
            state["recent_losses"] = list(self.spikes.losses)
        self.saver.save(self.position, state, wait)

    def finish_saving(self) -> None:
        """Waits for the checkpoint that is still being written, if any."""
        self.watchdog.begin(self.position.step, "waiting for a checkpoint")
        self.saver.wait()

    def save_what_is_new(self) -> None:
        """Writes a checkpoint unless the newest one holds every step already."""
        if not self.saver.holds(self.position.step):
            self.save(wait=True)


def _peak_flops_per_second(config: Config, topology: Topology) -> float | None:
    """Of all devices together; None where nobody says it and the device is unknown, or computes otherwise than known.

    Known are products in bfloat16.
    """
    if config.observe is not None and config.observe.peak_tflops is not None:
        return config.observe.peak_tflops * 1e12 * topology.world_size
    if config.train.precision != "bfloat16" or topology.device.type != "cuda":
        return None
    of_one = device_peak_flops_per_second(torch.cuda.get_device_name(topology.device))
    return None if of_one is None else of_one * topology.world_size
