"""metrics.jsonl: every step once, valid JSON, whatever was killed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import InputError
from pretrain.observe.metrics import MetricsLog, read_metrics, replace_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write_steps(path: Path, steps: range) -> None:
    with MetricsLog(path) as log:
        for step in steps:
            log.append({"step": step, "loss": 1 / step, "skipped": False})


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_a_line_can_be_read_before_the_file_is_closed(path: Path) -> None:
    log = MetricsLog(path)
    log.append({"step": 1, "loss": 2.5, "grad_norm": np.float32(0.5), "held_out_loss": None, "skipped": False})
    assert read_metrics(path) == [{"step": 1, "loss": 2.5, "grad_norm": 0.5, "skipped": False}]
    log.close()


def test_values_that_are_not_finite_are_null_and_the_step_counts_as_skipped(path: Path) -> None:
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": 2.0, "grad_norm": float("inf"), "skipped": False})
        log.append({"step": 2, "loss": float("nan"), "grad_norm": float("nan")})
        log.append({"step": 3, "loss": 2.0, "held_out_loss": float("nan"), "skipped": False})
    strict = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert strict == [
        {"step": 1, "loss": 2.0, "grad_norm": None, "skipped": True},
        {"step": 2, "loss": None, "grad_norm": None, "skipped": True},
        {"step": 3, "loss": 2.0, "held_out_loss": None, "skipped": False},
    ]


def test_a_step_cannot_stand_twice(path: Path) -> None:
    write_steps(path, range(1, 4))
    with MetricsLog(path) as log, pytest.raises(ValueError, match="already holds step 3"):
        log.append({"step": 3, "loss": 1.0})
    assert steps_in(path) == [1, 2, 3]


def test_a_metric_must_be_a_number(path: Path) -> None:
    with MetricsLog(path) as log, pytest.raises(ValueError, match="'loss' must be a number"):
        log.append({"step": 1, "loss": "2.0"})


@pytest.mark.parametrize("half_line", [b"", b'{"step": 6, "los', b"\0\0\0\0", b"{"])
def test_a_resumed_run_has_every_step_once(path: Path, half_line: bytes) -> None:
    write_steps(path, range(1, 6))
    with path.open("ab") as file:
        file.write(half_line)
    with MetricsLog(path) as log:
        assert log.truncate_after(3) == 2
        for step in (4, 5, 6):
            log.append({"step": step, "loss": 9.0})
    records = read_metrics(path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in records[3:]] == [9.0] * 3
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("half_line", [b'{"step": 3, "los', b"\0\0\0\0"])
def test_a_half_line_goes_when_no_whole_line_has_to(path: Path, half_line: bytes) -> None:
    write_steps(path, range(1, 3))
    with path.open("ab") as file:
        file.write(half_line)
    with MetricsLog(path) as log:
        assert log.truncate_after(2) == 0
        log.append({"step": 3, "loss": 9.0})
    assert steps_in(path) == [1, 2, 3]


def test_truncation_at_the_last_step_keeps_the_bytes_and_at_zero_leaves_nothing(path: Path) -> None:
    write_steps(path, range(1, 6))
    before = path.read_bytes()
    with MetricsLog(path) as log:
        assert log.truncate_after(5) == 0
        assert path.read_bytes() == before
        assert log.truncate_after(0) == 5
        log.append({"step": 1, "loss": 1.0})
    assert steps_in(path) == [1]


def test_a_whole_last_line_without_its_newline_is_kept(path: Path) -> None:
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')
    with MetricsLog(path) as log:
        log.append({"step": 3, "loss": 0.5})
    assert steps_in(path) == [1, 2, 3]


def test_reading_tolerates_a_half_line_at_the_end(path: Path) -> None:
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert steps_in(path) == [1]


@pytest.mark.parametrize("damage", ['{"step": 2, "lo', "[1, 2]", '{"loss": 1.0}', '{"step": 2, "loss": NaN}', "x"])
def test_a_damaged_line_in_the_middle_is_named(path: Path, damage: str) -> None:
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_metrics(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(InputError, match="no such metrics file"):
        read_metrics(path)


def test_a_replacement_that_fails_leaves_the_earlier_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"earlier")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"earlier"
