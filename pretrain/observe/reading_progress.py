"""How much of a source has been read: a live line on a terminal, a line of text every so many seconds elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich import progress as rich_progress
from rich.console import Console

_SECONDS_BETWEEN_REFRESHES = 0.1
SECONDS_BETWEEN_LINES = 10.0


class ReadingProgress:
    """Shows what is being read and what is done with it. A context manager.

    Args:
        stream: where to write; standard error unless given.
        clock: seconds that only go forward; for tests.
    """

    def __init__(self, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._line_at = clock()
        self._refreshed = -math.inf
        console = Console(file=self._stream, highlight=False, markup=False)
        self._bar: rich_progress.Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # Refreshed from the calls, so that no thread takes turns with the one that reads.
            self._bar = rich_progress.Progress(
                rich_progress.SpinnerColumn(),
                rich_progress.TextColumn("{task.description}"),
                rich_progress.TimeElapsedColumn(),
                console=console,
                auto_refresh=False,
                transient=True,
            )
            self._task = self._bar.add_task("", total=None)
            self._bar.start()

    def read(self, name: str, size: int) -> None:
        """``size`` bytes of the source ``name`` have been read."""
        text = f"reading {name}: {size / 1e6:,.1f} MB"
        now = self._clock()
        if self._bar is not None:
            if now - self._refreshed >= _SECONDS_BETWEEN_REFRESHES:
                self._show(text, now)
        elif now - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = now
            print(text, file=self._stream, flush=True)

    def begin(self, text: str) -> None:
        """Shows what takes its time now and cannot say how far it is."""
        if self._bar is not None:
            self._show(text, self._clock())
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was. May be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> ReadingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, text: str, now: float) -> None:
        assert self._bar is not None
        self._refreshed = now
        self._bar.update(self._task, description=text)
        self._bar.refresh()
