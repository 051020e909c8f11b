"""Everything that a run tells: metrics.jsonl, samples.jsonl, the progress on screen, Weights & Biases, TensorBoard.

Rank 0 only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from pretrain.checkpoint.training import TrainingPosition
from pretrain.config.schema import Config
from pretrain.errors import InputError, TrainingError
from pretrain.observe.metrics import MetricsLog, StepLog
from pretrain.observe.progress import Progress
from pretrain.observe.run_directory import RunDirectory
from pretrain.observe.samples_log import SamplesLog
from pretrain.observe.tensorboard_logger import TensorBoardLogger
from pretrain.observe.wandb_logger import WandbLogger
from pretrain.parallel.engine import StepResult
from pretrain.parallel.schedule import BatchLoss
from pretrain.plan import model_flops_per_token


class Observer:
    """Takes what each step measured and passes it on; on ranks other than 0 it does nothing.

    The clock runs only between :meth:`start_step` and :meth:`finish_step`, so evaluations and checkpoints do
    not lower the tokens per second of the step after them.

    Args:
        start_step: steps done before.
        is_main: whether this is rank 0.
        peak_flops_per_second: what all devices together could do at most; None where that is not known.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        start_step: int,
        is_main: bool,
        peak_flops_per_second: float | None = None,
    ):
        self.config, self.run, self.first_step, self.is_main = config, run, start_step, is_main
        self.peak_flops_per_second = peak_flops_per_second
        self._flops_per_token: dict[int, float] = {}
        self.pending: dict[str, object] = {}
        self.failed_checkpoints = 0
        self._behind: set[StepLog] = set()
        self._began = 0.0

    def open(self) -> None:
        """Opens what is written to; on rank 0 only.

        Raises:
            InputError: earlier metrics are damaged or cannot be written, or Weights & Biases or TensorBoard cannot be
                used as configured.
        """
        config = self.config
        self.metrics = MetricsLog(self.run.metrics_file)
        self.logs: list[StepLog] = [self.metrics]
        # Also where none are asked for any more: those of steps that are trained again must go.
        if (config.observe and config.observe.samples) or self.run.samples_file.exists():
            self.samples = SamplesLog(self.run.samples_file)
            self.logs.append(self.samples)
        for log in self.logs:
            try:
                log.truncate_after(self.first_step)
            except OSError as error:
                raise InputError(f"{log.path} cannot be written: {error.strerror or error}") from None
        self.loggers: list[WandbLogger | TensorBoardLogger] = []
        if config.wandb:
            self.loggers.append(WandbLogger(config.wandb, self.run.path, config.model_dump(mode="json")))
        if config.tensorboard:
            self.loggers.append(TensorBoardLogger(config.tensorboard, self.run.path, self.first_step))
        self.progress = Progress(config.train.steps, self.first_step, config.train.log_every)

    def __enter__(self) -> Observer:
        if self.is_main:
            self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_main:
            self.flush()
            lost = None
            for log in self.logs:
                try:
                    log.close()
                except OSError as failure:
                    lost = f"{log.path}: its last lines could not be written: {failure.strerror or failure}"
                    self.message(lost)
            self.progress.__exit__(kind, error, trace)
            for logger in self.loggers:
                logger.close()
            if lost and kind is None:
                raise TrainingError(lost)

    def message(self, text: str) -> None:
        """One line for whoever watches."""
        if self.is_main:
            self.progress.message(text)

    def start_step(self) -> None:
        """Starts the clock of a step."""
        self.flush()
        self._began = time.perf_counter()

    def finish_step(
        self,
        loss: BatchLoss,
        result: StepResult,
        learning_rate: float,
        tokens: int,
        position: TrainingPosition,
        sequence_length: int,
        further: Mapping[str, float],
    ) -> None:
        """Takes the figures of one step.

        Args:
            tokens: how many the step read.
            position: of the run behind this step.
            sequence_length: of the rows that they were read in.
            further: what the model's mixers, the data and the devices report, over all layers and ranks.
        """
        if not self.is_main:
            return
        rate = tokens / max(time.perf_counter() - self._began, 1e-9)
        achieved, peak = rate * self._model_flops(sequence_length, further), self.peak_flops_per_second
        self.pending = {
            "step": position.step,
            "loss": loss.nats_per_token,
            "bits_per_byte": loss.bits_per_byte,
            "grad_norm": result.gradient_norm,
            "learning_rate": learning_rate,
            "tokens": position.tokens,
            "samples": position.samples,
            "tokens_per_second": rate,
            "tflops_per_second": achieved / 1e12,
            **({} if peak is None else {"model_flops_utilization": achieved / peak}),
            "skipped": not result.applied,
            **({"failed_checkpoints": self.failed_checkpoints} if self.failed_checkpoints else {}),
            **further,
        }
        self.progress.update(position.step, self.pending)

    def _model_flops(self, sequence_length: int, further: Mapping[str, float]) -> float:
        """Useful FLOPs of a token in rows of this length; with as many chunks as the model chose, where it does."""
        config, hierarchy = self.config, self.config.model.hierarchy
        data = config.data.model_copy(update={"sequence_length": sequence_length})
        if hierarchy is not None:
            model = config.model.model_copy(update={"hierarchy": hierarchy.measured(further)})
            return model_flops_per_token(config.model_copy(update={"data": data, "model": model}))
        if sequence_length not in self._flops_per_token:
            self._flops_per_token[sequence_length] = model_flops_per_token(config.model_copy(update={"data": data}))
        return self._flops_per_token[sequence_length]

    def evaluated(self, step: int, loss: BatchLoss, sources: Mapping[str, BatchLoss]) -> None:
        """Adds an evaluation, and of a mixture that of each source, to the figures of the step that it followed."""
        if self.is_main:
            self.pending |= {
                "step": step,
                "held_out_loss": loss.nats_per_token,
                "held_out_bits_per_byte": loss.bits_per_byte,
            }
            for name, of_source in sources.items():
                self.pending[f"held_out_loss_{name}"] = of_source.nats_per_token
                self.pending[f"held_out_bits_per_byte_{name}"] = of_source.bits_per_byte
            self.progress.evaluation(step, loss.nats_per_token, loss.bits_per_byte)

    def sampled(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Records what the model wrote behind each prompt after a step."""
        if self.is_main:
            self._log(self.samples, lambda: self.samples.append(step, prompts, texts))
            for logger in self.loggers:
                logger.log_samples(step, prompts, texts)

    def checkpoint_failed(self, text: str) -> None:
        """One checkpoint less than there should be: says so, and counts it in the figures from now on."""
        self.failed_checkpoints += 1
        if self.is_main:
            if self.pending:
                self.pending["failed_checkpoints"] = self.failed_checkpoints
            self.message(f"NOT SAVED, training goes on without this checkpoint: {text}")

    def flush(self) -> None:
        """Writes the figures of the last step, once all of them are there."""
        if self.is_main and self.pending:
            self._log(self.metrics, lambda: self.metrics.append(self.pending))
            for logger in self.loggers:
                logger.log(int(self.pending["step"]), self.pending)
            self.pending = {}

    def sync(self) -> None:
        """Makes all lines so far durable: a checkpoint must not be newer than its logs, unless the disk is full."""
        self.flush()
        if self.is_main:
            for log in self.logs:
                self._log(log, log.sync)

    def _log(self, log: StepLog, write: Callable[[], None]) -> None:
        """Says once that a log falls behind, and once that it has caught up; training goes on meanwhile."""
        try:
            write()
        except OSError as error:
            if log not in self._behind:
                self.message(
                    f"{log.path} CANNOT BE WRITTEN ({error.strerror or error}): training goes on, and its lines are "
                    f"kept in memory until they can be"
                )
            self._behind.add(log)
            return
        if log in self._behind:
            self.message(f"{log.path} is written again, with the lines that were kept")
        self._behind.discard(log)
