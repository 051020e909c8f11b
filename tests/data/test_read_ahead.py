"""Reading ahead changes neither what is read nor what a failure says."""

from __future__ import annotations

import threading

import pytest

from data.errors import DataError
from data.read_ahead import ReadAhead


def test_the_following_read_runs_before_it_is_asked_for() -> None:
    asked: list[int] = []
    began = threading.Event()

    def read(position: int) -> int:
        asked.append(position)
        if position == 5:
            began.set()
        return position * 10

    reader = ReadAhead(read)
    assert reader.take(0, 5) == 0
    assert began.wait(timeout=30), "nothing was read ahead"
    assert reader.take(5, None) == 50
    assert asked == [0, 5], "a position was read twice"
    reader.close()
    assert asked == [0, 5]


def test_another_position_than_expected_is_read() -> None:
    reader = ReadAhead(lambda position: position * 10)
    assert reader.take(0, 4) == 0
    assert reader.take(8, 12) == 80
    assert reader.take(12, None) == 120
    reader.close()


def test_a_failure_is_raised_by_the_read_that_failed() -> None:
    failing = {4}

    def read(position: int) -> int:
        if position in failing:
            raise DataError("the disk is gone")
        return position

    reader = ReadAhead(read)
    assert reader.take(0, 4) == 0
    with pytest.raises(DataError, match="the disk is gone"):
        reader.take(4, 8)
    failing.clear()
    assert reader.take(4, 8) == 4
    assert reader.take(8, None) == 8
    reader.close()
