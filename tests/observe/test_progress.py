"""What is printed while training, with and without a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from pretrain.observe.progress import Progress

METRICS = {
    "loss": 2.345,
    "bits_per_byte": 3.3831,
    "grad_norm": 0.412,
    "learning_rate": 3e-3,
    "tokens": 20480,
    "tokens_per_second": 12345.4,
    "tflops_per_second": 0.1234,
    "skipped": False,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ticking(seconds: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += seconds


def plain(total: int, start: int = 0, every: int = 1, seconds: float = 1.0) -> tuple[Progress, io.StringIO]:
    stream, clock = io.StringIO(), ticking(seconds)
    return Progress(total, start, every, stream=stream, clock=lambda: next(clock)), stream


def steps_printed(stream: io.StringIO) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines() if line[:5] == "step "]


def test_a_line_holds_all_that_is_known() -> None:
    progress, stream = plain(600, start=19, seconds=2.0)
    progress.update(20, METRICS)
    assert stream.getvalue() == (
        "step 20/600  loss 2.3450  bits/byte 3.3831  grad_norm 0.412  lr 3.00e-03  12,345 tokens/s  "
        "0.1234 TFLOP/s  eta 0:19:20\n"  # 580 steps of 2 s
    )


def test_what_is_not_known_is_left_out() -> None:
    progress, stream = plain(3)
    progress.update(1, {"loss": 2.0, "model_flops_utilization": 0.4321, "bits_per_byte": None})
    assert stream.getvalue() == "step 1/3  loss 2.0000  43.2% MFU  eta 0:00:02\n"


def test_lines_come_every_so_many_steps_and_first_and_last_always() -> None:
    progress, stream = plain(50, start=3, every=20)
    with progress:
        for step in range(4, 51):
            progress.update(step, METRICS)
    assert steps_printed(stream) == [4, 20, 40, 50]


def test_a_run_that_stops_early_shows_its_last_step_once() -> None:
    progress, stream = plain(50, every=20)
    for step in range(1, 38):
        progress.update(step, METRICS)
    progress.close()
    progress.close()
    assert steps_printed(stream) == [1, 20, 37]


def test_a_skipped_step_is_always_shown() -> None:
    progress, stream = plain(50, every=20)
    for step in range(1, 10):
        progress.update(step, {**METRICS, "grad_norm": float("nan"), "skipped": step == 7})
    assert steps_printed(stream) == [1, 7]
    assert "SKIPPED" in stream.getvalue().splitlines()[1] and "SKIPPED" not in stream.getvalue().splitlines()[0]


def test_an_evaluated_step_shows_its_training_loss_first() -> None:
    progress, stream = plain(50, every=20)
    for step in range(1, 6):
        progress.update(step, {"loss": 2.0})
    progress.evaluation(5, 2.5)
    progress.close()
    first, training, held_out = (line.split("  ") for line in stream.getvalue().splitlines())
    assert first[0] == "step 1/50"
    assert training[:2] == ["step 5/50", "loss 2.0000"]
    assert held_out == ["step 5/50", "held-out loss 2.5000"]


def test_time_left_follows_the_latest_steps() -> None:
    times = iter([0.0, 1000.0, *(1000.0 + step for step in range(1, 200))])
    stream = io.StringIO()
    progress = Progress(200, 0, 1, stream=stream, clock=lambda: next(times))
    for step in range(1, 101):
        progress.update(step, {})
    assert stream.getvalue().splitlines()[-1].endswith("eta 0:01:40"), "the slow first step must be forgotten"


def test_evaluations_and_messages_are_lines_of_their_own() -> None:
    progress, stream = plain(10, every=5)
    progress.evaluation(5, 2.0, 2.8854)
    progress.evaluation(6, 1.5)
    progress.message("saved [bold]runs/x[/bold]")
    assert stream.getvalue().splitlines() == [
        "step 5/10  held-out loss 2.0000  bits/byte 2.8854",
        "step 6/10  held-out loss 1.5000",
        "saved [bold]runs/x[/bold]",
    ]


def test_a_terminal_gets_a_bar_and_messages_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream, clock = Terminal(), ticking(1.0)
    with Progress(10, 0, 5, stream=stream, clock=lambda: next(clock)) as progress:
        progress.update(1, METRICS)
        progress.message("saved [x]")
        progress.evaluation(1, 2.0, 2.8854)
        progress.update(10, METRICS)
    text = stream.getvalue()
    for expected in ("step 1/10", "step 10/10", "loss 2.3450", "12,345 tokens/s", "saved [x]", "held-out loss 2.0000"):
        assert expected in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden once and shown again"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    progress = Progress(10, 0, 5, stream=stream)
    progress.update(1, METRICS)
    progress.close()
    assert stream.getvalue().startswith("step 1/10  loss") and "\x1b" not in stream.getvalue()


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    # Every write to this device fails for want of room, as on a full disk.
    with open("/dev/full", "w") as stream:
        progress = Progress(3, stream=stream)
        for step in (1, 2, 3):
            progress.update(step, {"loss": 1.0})
            progress.message("a line" * 1000)
        progress.evaluation(3, 1.0)
        progress.close()
        progress.close()
