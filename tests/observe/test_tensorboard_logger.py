"""TensorBoard: figures by step, one sentence where the package is missing, and never the end of training."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.config.observe import TensorBoardConfig
from pretrain.errors import InputError
from pretrain.observe.tensorboard_logger import TensorBoardLogger


class FakeWriter:
    def __init__(self, directory: str, **options: Any) -> None:
        self.directory, self.options = directory, options
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int]] = []
        self.closed = False
        self.failure: Exception | None = None

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.failure:
            raise self.failure
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts.append((name, text, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[FakeWriter]:
    """Stand-ins for the package's writer, in the order in which they are made."""
    made: list[FakeWriter] = []

    def make(directory: str, **options: Any) -> FakeWriter:
        made.append(FakeWriter(directory, **options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=make))
    return made


def test_numbers_are_written_by_step_and_others_left_out(writers: list[FakeWriter], tmp_path: Path) -> None:
    logger = TensorBoardLogger(TensorBoardConfig(flush_seconds=7), tmp_path, first_step=4)
    logger.log(5, {"step": 5, "loss": 2.5, "grad_norm": float("nan"), "held_out_loss": None, "skipped": True})
    logger.close()
    (writer,) = writers
    assert writer.directory == str(tmp_path / "tensorboard")
    # Steps behind the checkpoint, which are trained again, must not stand twice.
    assert writer.options == {"purge_step": 5, "flush_secs": 7}
    assert writer.scalars == [("loss", 2.5, 5), ("skipped", True, 5)]
    assert writer.closed


def test_samples_are_shown_as_they_are(writers: list[FakeWriter], tmp_path: Path) -> None:
    logger = TensorBoardLogger(TensorBoardConfig(), tmp_path, first_step=0)
    logger.log_samples(7, ["# a ", ""], ["*b*\n<i>c", ""])
    assert writers[0].texts == [("samples/0", "    # a *b*\n    <i>c", 7), ("samples/1", "    ", 7)]


def test_a_failure_is_told_once_and_training_goes_on(
    writers: list[FakeWriter], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = TensorBoardLogger(TensorBoardConfig(), tmp_path, first_step=0)
    writers[0].failure = OSError("disk full")
    with caplog.at_level(logging.WARNING):
        logger.log(1, {"loss": 1.0})
        logger.log(2, {"loss": 1.0})
    assert len(caplog.records) == 1 and "disk full" in caplog.text


def test_without_the_package_the_section_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TensorBoardLogger(TensorBoardConfig(), tmp_path, first_step=0)


def test_its_own_reader_finds_what_was_written(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, losses in ((0, [3.0, 2.0, 1.0]), (1, [1.5])):
        logger = TensorBoardLogger(TensorBoardConfig(), tmp_path, first)
        for step, loss in enumerate(losses, start=first + 1):
            logger.log(step, {"loss": loss, "grad_norm/layers.0": 2 * loss})
            logger.log_samples(step, ["a"], [f" of {loss}"])
        logger.close()
    events = reading.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("grad_norm/layers.0")] == [(1, 6.0), (2, 3.0)]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 1.5)]
    # Of texts this reader, unlike the page, keeps those of the earlier start too.
    texts = [(event.step, event.tensor_proto.string_val[0]) for event in events.Tensors("samples/0/text_summary")]
    assert texts[0] == (1, b"    a of 3.0") and texts[-1] == (2, b"    a of 1.5")
