"""Metrics to TensorBoard, in files beside the run; never the end of training."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config.observe import TensorBoardConfig
from pretrain.errors import InputError
from pretrain.observe.optional_service import OptionalService


class TensorBoardLogger:
    """One run, kept under ``tensorboard/`` in the run directory; rank 0 alone makes one.

    Steps that are trained a second time after a crash replace those of the earlier start.

    Args:
        run_directory: the run's directory, which exists.
        first_step: steps that were done before this start.

    Raises:
        InputError: the package is missing, or the directory cannot be written.
    """

    def __init__(self, config: TensorBoardConfig, run_directory: Path, first_step: int) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise InputError(
                f"the section 'tensorboard' needs the package tensorboard, which cannot be imported ({error}); install "
                f"it with 'pip install tensorboard', or take the section out"
            ) from None
        self._service = OptionalService("TensorBoard")
        directory = Path(run_directory) / "tensorboard"
        try:
            self._writer = module.SummaryWriter(
                str(directory), purge_step=first_step + 1, flush_secs=config.flush_seconds
            )
        except OSError as error:
            raise InputError(f"{directory} cannot be written: {error.strerror or error}") from None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the numbers of a step; a failure is reported once in the log and never raised."""

        def write() -> None:
            for name, value in metrics.items():
                if name != "step" and value is not None and math.isfinite(value):
                    self._writer.add_scalar(name, value, step)

        self._service.attempt(write)

    def log_samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Writes what the model wrote behind each prompt, under ``samples/`` and the prompt's number."""

        def write() -> None:
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                # Shown as Markdown, in which lines that begin so are code.
                lines = f"{prompt}{text}".splitlines() or [""]
                self._writer.add_text(f"samples/{number}", "\n".join(f"    {line}" for line in lines), step)

        self._service.attempt(write)

    def close(self) -> None:
        """Writes what is still in memory."""
        self._service.attempt(self._writer.close)
