"""How far training is: a live bar on a terminal, one line of text every so many steps elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, TextIO

from rich import progress as rich_progress
from rich.console import Console, RenderableType
from rich.text import Text

_SPEED_WINDOW = 50
_SECONDS_BETWEEN_REFRESHES = 0.1


class _BarWithNumbers(rich_progress.Progress):
    """A bar with a line of numbers below it, which stay readable where the terminal is narrow."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.numbers, no_wrap=True, overflow="ellipsis")


class Progress:
    """Shows the steps of a run; only rank 0 makes one. A context manager.

    What cannot be shown (a log on a full disk, a terminal that is gone) is left out: it must not end training, and
    ``metrics.jsonl`` has it too.

    Args:
        total_steps: steps of the whole run.
        start_step: steps that were done before this start.
        log_every: steps between two lines of text where there is no terminal; the first step, the last one,
            evaluated and skipped ones are always printed.
        stream: where to write; standard output unless given.
        clock: seconds that only go forward; for tests.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        log_every: int = 1,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._first = start_step + 1
        self._log_every = log_every
        self._clock = clock
        self._stream = sys.stdout if stream is None else stream
        self._times: deque[tuple[int, float]] = deque([(start_step, clock())], maxlen=_SPEED_WINDOW)
        self._pending: str | None = None
        self._refreshed = -math.inf
        console = Console(file=self._stream, highlight=False, markup=False)
        self._bar: _BarWithNumbers | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # Refreshed from update() rather than from a thread: the loop's process also forks data workers.
            self._bar = _BarWithNumbers(
                rich_progress.TextColumn("step {task.completed}/{task.total}"),
                rich_progress.BarColumn(bar_width=None),
                rich_progress.TextColumn("{task.percentage:>3.0f}%  eta {task.fields[eta]}"),
                console=console,
                auto_refresh=False,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, eta="-")
            self._show(self._bar.start)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a step that is done.

        Args:
            step: steps done of the whole run, this one included.
            metrics: as in ``metrics.jsonl``; ``bits_per_byte`` of the training loss too, where it is known.
        """
        self._times.append((step, self._clock()))
        if self._bar is not None:
            self._bar.numbers = "  ".join(_numbers(metrics))
            self._bar.update(self._task, completed=step, eta=self._eta(step))
            now = self._clock()
            if now - self._refreshed >= _SECONDS_BETWEEN_REFRESHES or step >= self._total:
                self._refreshed = now
                self._show(self._bar.refresh)
            return
        line = "  ".join([f"step {step}/{self._total}", *_numbers(metrics), f"eta {self._eta(step)}"])
        due = step % self._log_every == 0 or step == self._first or step >= self._total
        if due or metrics.get("skipped"):
            self._pending = None
            self._print(line)
        else:
            self._pending = line

    def evaluation(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        """Show a loss on held-out data, in nats per token, and in bits per byte where the text is known."""
        line = f"step {step}/{self._total}  held-out loss {loss:.4f}"
        if bits_per_byte is not None:
            line += f"  bits/byte {bits_per_byte:.4f}"
        # The training loss of the same step belongs above it, due or not.
        self._print_pending()
        self._print(line)

    def message(self, text: str) -> None:
        """Show a line of text as it is."""
        self._print(text)

    def close(self) -> None:
        """Show the last step that was not shown yet, and leave the terminal as it was. May be called twice."""
        self._print_pending()
        if self._bar is not None:
            self._show(self._bar.refresh)
            self._show(self._bar.stop)
            self._bar = None
        if not self._show(self._stream.flush):
            _drop_output(self._stream)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print_pending(self) -> None:
        if self._pending is not None:
            self._print(self._pending)
            self._pending = None

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._show(lambda: self._bar.console.print(text))
        else:
            self._show(lambda: print(text, file=self._stream, flush=True))

    def _show(self, write: Callable[[], object]) -> bool:
        """Whether it could be written."""
        try:
            write()
        except OSError:
            return False
        return True

    def _eta(self, step: int) -> str:
        """Time left at the speed of the latest steps, as ``h:mm:ss``."""
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        if last_step == first_step:
            return "-"
        seconds = (last_time - first_time) / (last_step - first_step) * max(0, self._total - step)
        return str(timedelta(seconds=round(seconds)))


def _drop_output(stream: TextIO) -> None:
    """Lets go of what a stream has not written, or Python ends with an exit code of its own because of it."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(descriptor, stream.fileno())
    finally:
        os.close(descriptor)


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics as words, in the order in which they are read; what is not known is left out."""
    shown = []
    for key, text in (
        ("loss", "loss {:.4f}"),
        ("bits_per_byte", "bits/byte {:.4f}"),
        ("grad_norm", "grad_norm {:.3g}"),
        ("learning_rate", "lr {:.2e}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("tflops_per_second", "{:.4g} TFLOP/s"),
    ):
        if metrics.get(key) is not None:
            shown.append(text.format(metrics[key]))
    if metrics.get("model_flops_utilization") is not None:
        shown.append(f"{100 * metrics['model_flops_utilization']:.1f}% MFU")
    if metrics.get("skipped"):
        shown.append("SKIPPED (loss or gradient not finite)")
    return shown
