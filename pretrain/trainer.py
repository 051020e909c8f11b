"""One run: what the loop needs, opened in the order in which it can fail, and what a step of it is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from data.batch import Batch
from data.dataset import Data, SplitSummary, open_data
from data.mixture import Phase
from data.order import merged, rank_share, sample_indices
from data.read_ahead import ReadAhead
from data.samples import MixtureSamples
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.recurrent_states import restore_states
from pretrain.checkpoint.rollback import finish_rollbacks, left_out_of
from pretrain.checkpoint.saver import CheckpointSaver
from pretrain.checkpoint.training import (
    TrainingPosition,
    begins_a_run,
    read_moments,
    read_position,
    restore_random_state,
)
from pretrain.config.schema import Config
from pretrain.errors import InputError
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
        self.data: Data = self._open_data()
        self.reader: ReadAhead[list[Batch]] = ReadAhead(self._read_batch)
        self.topology: Topology = build_topology(config)
        self.run = RunDirectory(Path(config.run.directory))
        rank, size = self.topology.rank, self.topology.world_size
        self.slow_ranks = SlowRanks(config, self.topology)
        # Half-open ranges of samples that a rollback has taken out of the order of the data.
        self.left_out: list[tuple[int, int]] = []
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
        self.left_out = on_main_rank(lambda: finish_rollbacks(self.run.path, self.run.checkpoints))
        start_from = on_main_rank(lambda: choose_checkpoint(self.run, self.data, config, resume))
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

    def _open_data(self) -> Data:
        train = self.config.train
        data = open_data(self.config.data, train.seed, train.global_batch_size if train.carry_state else None)
        needed, given = data.tokenizer.vocab_size, self.config.model.vocab_size
        if needed > given:
            raise InputError(
                f"model.vocab_size={given} is smaller than the vocabulary of data.tokenizer, which has "
                f"{needed} ids; set model.vocab_size to at least {-(-needed // 8) * 8}"
            )
        return data

    def _begin(self, model: object, reader: CheckpointReader) -> None:
        """Starts with imported weights."""
        self.position = TrainingPosition()
        on_every_rank(lambda: read_weights(model, reader))
        self.engine = build_engine(model, self.config, self.topology)

    def _resume(self, model: object, reader: CheckpointReader) -> None:
        self.position = read_position(reader)
        self.left_out = merged([*self.left_out, *left_out_of(reader.state)])
        if self.spikes is not None:
            self.spikes = SpikeDetector(self.config.train.spikes, reader.state.get("recent_losses", []))
        if isinstance(self.data.train, MixtureSamples):
            recorded = [Phase(**phase) for phase in reader.state["mixture_phases"]]
            self.data.train.go_on(recorded, self.position.samples)
        self.data.go_on(reader.state.get("bookmarks", {}))
        on_every_rank(lambda: read_weights(model, reader))
        restore_random_state(reader)
        self.engine = build_engine(model, self.config, self.topology)
        on_every_rank(lambda: restore_states(model, reader, self.config, self.topology))
        if self.position.updates > 0:
            self.engine.write_moments(read_moments(reader, self.engine), self.position.updates)

    def _announce(self, start_from: Path | None, changed: dict[str, tuple]) -> None:
        summary, steps = self.data.summary, self.config.train.steps
        for key, (before, now) in changed.items():
            self.observer.message(f"changed since the run began: {key} {before} -> {now}")
        self.observer.message(f"{_described(summary.train)}, {summary.held_out.counts.tokens:,} held out")
        if isinstance(self.data.train, MixtureSamples):
            self.observer.message(f"mixture: {self._epochs_of_sources()}")
        if self.config.train.carry_state:
            rows = self.config.train.global_batch_size
            each = summary.train.samples_per_epoch // rows
            self.observer.message(f"each of {rows} rows goes on from step to step, through {each:,} samples an epoch")
        if start_from is not None:
            began = "resumed from" if self.position.step else "begun with the weights of"
            self.observer.message(f"{began} {start_from} at step {self.position.step} of {steps}")

    def _epochs_of_sources(self) -> str:
        """For each source of the mixture, how often it will have been read through at the end of the run."""
        end = self.config.train.steps * self.config.train.global_batch_size
        consumed = self.data.train.order.consumed(end)
        parts = []
        for name, samples in self.data.train.sources.items():
            if samples.samples_per_epoch is None:
                parts.append(f"{name} {consumed.get(name, 0):,} samples, streamed")
            else:
                parts.append(f"{name} {samples.epochs(consumed.get(name, 0)):.2f} epochs")
        return ", ".join(parts) + " by the end of the run"

    def close(self) -> None:
        """Ends what reads in the background, and lets another job have the run directory."""
        self.reader.close()
        self.data.close()
        self.run.release()

    def _read_batch(self, first: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that begins with sample ``first``."""
        train, topology = self.config.train, self.topology
        indices = sample_indices(first, train.global_batch_size, self.left_out)
        shares = rank_share(indices, train.micro_batch_size, topology.data_rank, topology.data_size)
        length = self.config.data.length_at(first * self.config.data.sequence_length)
        return [self.data.train.batch(share).cut(length) for share in shares]

    def read_step(self) -> list[Batch]:
        """The next step's micro-batches; those of the step after it are read meanwhile.

        Raises:
            DataError: on every rank, where one of them could not read its part; the position stays where it is.
        """
        position, train = self.position, self.config.train
        self.watchdog.begin(position.step + 1, "reading data")
        self.observer.start_step()
        following = self._behind_next_batch() if position.step + 1 < train.steps else None

        def read() -> list[Batch]:
            with self.slow_ranks.measure("reading data"):
                return self.reader.take(position.samples, following)

        return together(read, self.topology.device)

    def _behind_next_batch(self) -> int:
        """The data's position when the next batch is read."""
        return sample_indices(self.position.samples, self.config.train.global_batch_size, self.left_out)[-1] + 1

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
        position.samples = self._behind_next_batch()
        position.tokens += tokens
        position.skipped_steps += not result.applied
        position.skipped_in_a_row = 0 if result.applied else position.skipped_in_a_row + 1
        further = self._mixer_metrics() | self._source_metrics() | self.engine.decoder.take_loss_terms(loss.labels)
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

    def _source_metrics(self) -> dict[str, float]:
        """How often each source of a mixture was read through so far."""
        if not isinstance(self.data.train, MixtureSamples):
            return {}
        return {f"epochs_{name}": count for name, count in self.data.train.epochs(self.position.samples).items()}

    def evaluate(self) -> HeldOutLoss:
        """Loss on held-out samples, of a mixture by source too, recorded with the last step."""
        self.watchdog.begin(self.position.step, "evaluation")
        loss = evaluate_held_out(
            self.engine.model,
            self.engine.decoder,
            self.data.held_out,
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
        texts = sample_texts(self.engine, self.data.tokenizer, settings, self.config.train.seed)
        if texts is None:
            self.observer.message(f"step {step}: no samples, because the model's logits are not finite")
        else:
            self.observer.sampled(step, settings.prompts, texts)

    def _data_state(self) -> dict[str, object]:
        """What a later start needs to go on with this data."""
        state: dict[str, object] = {
            "data_fingerprint": self.data.fingerprint,
            "bookmarks": self.data.bookmarks(self.position.samples),
            **({"left_out_samples": self.left_out} if self.left_out else {}),
            **({"recent_losses": list(self.spikes.losses)} if self.spikes else {}),
        }
        if isinstance(self.data.train, MixtureSamples):
            state["source_fingerprints"] = self.data.source_fingerprints
            state["mixture_phases"] = [asdict(phase) for phase in self.data.train.order.phases]
        return state

    def save(self, wait: bool) -> None:
        """Writes a checkpoint, or begins to, and removes those that ``keep_last`` and ``keep_every`` do not keep.

        Args:
            wait: until it is written.
        """
        self.watchdog.begin(self.position.step, "saving")
        self.observer.sync()
        self.saver.save(self.position, self._data_state(), wait)

    def finish_saving(self) -> None:
        """Waits for the checkpoint that is still being written, if any."""
        self.watchdog.begin(self.position.step, "waiting for a checkpoint")
        self.saver.wait()

    def save_what_is_new(self) -> None:
        """Writes a checkpoint unless the newest one holds every step already."""
        if not self.saver.holds(self.position.step):
            self.save(wait=True)


def _described(split: SplitSummary) -> str:
    if split.counts is None:
        return "training tokens are streamed"
    return f"{split.counts.tokens:,} training tokens in {split.counts.documents:,} documents"


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
