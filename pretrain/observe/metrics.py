"""The metrics of a run: one JSON object per step, each step once, whatever was killed in between.

A line holds ``step`` (optimizer steps done), ``loss`` (nats per token), ``grad_norm`` (global, before
clipping), ``learning_rate``, ``tokens`` (trained on since step 0), ``tokens_per_second``, ``skipped``; where
they are known ``tflops_per_second`` and ``model_flops_utilization`` (useful work as a fraction of what the devices
could do: as ``observe.peak_tflops`` says, or else in bfloat16, of devices that are known), and on the steps that were
evaluated ``held_out_loss`` (nats per token) and ``held_out_bits_per_byte``, of a mixture also of each source, as
``held_out_loss_NAME`` and ``held_out_bits_per_byte_NAME``. ``failed_checkpoints`` counts, from the first on, those
since the last start that could not be saved while training went on. ``samples`` is the place in the order of the data
behind the step; ``peak_memory_bytes`` the most that a process has held so far, on the rank that held most. Where an
``observe`` section asks for it, ``update_ratio`` is the norm of the step's update over that of the weights, and
``FIGURE/BLOCK`` the gradient norm, update ratio, gates and states of single blocks (``pretrain.observe.step_figures``).
``spike`` is true where ``train.spikes`` found one.

JSON has no NaN and no infinity: such a value is written as ``null``, and where it is the loss or the gradient
norm, ``skipped`` is true, because a step without a finite gradient changes no weight.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from pretrain.errors import InputError

_TAIL_BYTES = 1 << 16


def replace_file(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file so that a reader, or a crash, sees the earlier content or the new one and nothing between.

    Writes ``<name>.tmp`` beside it, forces that to disk where it shall be ``durable``, and renames it.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; a last line that was cut off while written is left out.

    Raises:
        InputError: when there is no such file, or a line before the end is damaged (its number is named).
    """
    return [record for _, record in _read_lines(Path(path))]


class StepLog:
    """Appends to a file of lines that each hold a ``step``; lines are with the operating system when appending returns.

    Lines that cannot be written (a full disk) are kept in memory, and tried again with each further line.

    A last line that a killed process left half written is taken off when the file is opened. Before a resumed
    run goes on, call :meth:`truncate_after` with the step of its checkpoint.

    Args:
        path: the file; made when it does not exist.

    Raises:
        InputError: when the existing file is damaged before its last line, or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._last_step = _mend_end(self.path)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror or error}") from None
        self._unwritten = bytearray()
        self._file = self._open()

    def truncate_after(self, step: int) -> int:
        """Drop, in one atomic replacement, the lines of steps beyond ``step``, which a killed run left.

        Returns:
            How many lines were dropped.
        """
        lines = _read_lines(self.path)
        kept = [(line, record) for line, record in lines if record["step"] <= step]
        if len(kept) < len(lines):
            replace_file(self.path, b"".join(line + b"\n" for line, _ in kept))
            self._file.close()
            self._file = self._open()
        self._last_step = kept[-1][1]["step"] if kept else None
        return len(lines) - len(kept)

    def sync(self) -> None:
        """Force the lines to disk; call it before a checkpoint is saved, so that it never outlives them.

        Raises:
            OSError: the system does not take all of them now; none is lost.
        """
        self._write_out()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing can be logged afterwards.

        Raises:
            OSError: the last lines cannot be written, and are lost.
        """
        try:
            self._write_out()
        finally:
            self._file.close()

    def _add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines of one step, which is the last one from now on."""
        for record in records:
            self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
            self._last_step = record["step"]
        self._write_out()

    def _write_out(self) -> None:
        while self._unwritten:
            # A full disk may take half a line; the rest follows where it ended.
            del self._unwritten[: self._file.write(self._unwritten)]

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> FileIO:
        try:
            return self.path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}") from None


class MetricsLog(StepLog):
    """The metrics of a run, a line for each step."""

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
            metrics: ``step``, which must be above every step already in the file, and numbers, truth values,
                0-d tensors or arrays, or ``None`` (left out) under the other keys.

        Raises:
            ValueError: for a step that stands already, or a value that is not a number.
            OSError: the system does not take the line now; it is not lost.
        """
        step = int(metrics["step"])
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"{self.path} already holds step {self._last_step}, so step {step} cannot be added; "
                f"call truncate_after before a resumed run goes on"
            )
        record: dict[str, Any] = {"step": step}
        for key, value in metrics.items():
            if key != "step" and value is not None:
                record[key] = _as_number(key, value)
        not_finite = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        record.update(dict.fromkeys(not_finite))
        if {"loss", "grad_norm"} & set(not_finite) and not record.get("skipped"):
            record["skipped"] = True
        self._add([record])


def _as_number(key: str, value: Any) -> int | float | bool:
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, int | float):
        raise ValueError(f"the metric '{key}' must be a number or a truth value, but is {type(value).__name__}")
    return value


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None where it is not one."""
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such metrics file; expected the metrics.jsonl of a run directory") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    lines = content.split(b"\n")
    found: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is not None:
            found.append((line, record))
        elif number < len(lines):
            # The last element follows the last newline: only that one can be a line cut off while written.
            raise InputError(
                f"{path}: line {number} is damaged; expected a JSON object with an integer 'step'; remove the line"
            )
    return found


def _mend_end(path: Path) -> int | None:
    """Take a half-written last line off a file; the step of its last whole line, None where it has none."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
    *whole, rest = tail.split(b"\n")
    if rest:
        # Either way the file must end in a newline before anything is appended.
        complete = _parse(rest) is not None
        with path.open("r+b") as file:
            if complete:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
                whole.append(rest)
            else:
                file.truncate(size - len(rest))
    last = next((line for line in reversed(whole) if line.strip()), None)
    if last is None:
        return None
    record = _parse(last)
    if record is None:
        raise InputError(f"{path}: its last line is damaged; expected a JSON object with 'step'; remove the line")
    return int(record["step"])
