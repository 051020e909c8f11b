"""How far a preparation is: a live bar on a terminal, a line of text every so many seconds elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TextIO

from rich import progress as rich_progress
from rich.console import Console

from data.preparation.directory import PreparationState

_SECONDS_BETWEEN_REFRESHES = 0.1
SECONDS_BETWEEN_LINES = 10.0


class PreparationProgress:
    """Shows how far the preparation of one source is. A context manager.

    Args:
        name: of the source, in front of what is shown; may be empty.
        stream: where to write; standard error unless given.
        clock: seconds that only go forward; for tests.
    """

    def __init__(
        self, name: str = "", *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._prefix = f"{name}: " if name else ""
        self._clock = clock
        self._begun = self._line_at = clock()
        self._refreshed = -math.inf
        console = Console(file=self._stream, highlight=False, markup=False)
        self._bar: rich_progress.Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # Refreshed from update() rather than from a thread, which would take turns with the one that works.
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.TextColumn("{task.fields[numbers]}"),
                console=console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task(self._prefix.rstrip(": "), total=None, numbers="")
            self._bar.start()

    def update(self, state: PreparationState) -> None:
        """Shows the state of now."""
        now = self._clock()
        if self._bar is not None:
            if now - self._refreshed >= _SECONDS_BETWEEN_REFRESHES:
                self._refreshed = now
                self._bar.update(
                    self._task,
                    total=state.total_bytes,
                    completed=state.bytes if state.total_bytes else None,
                    numbers=self._numbers(state, now),
                )
                self._bar.refresh()
        elif now - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = now
            print(f"{self._prefix}{self._numbers(state, now)}", file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was. May be called twice."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> PreparationProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _numbers(self, state: PreparationState, now: float) -> str:
        seconds = now - self._begun
        speed = state.bytes / seconds if seconds > 0 else 0.0
        words = [f"shard {state.shards}", f"{state.documents:,} documents", f"{state.bytes / 1e6:,.1f} MB"]
        if state.total_bytes:
            words[-1] += f" of {state.total_bytes / 1e6:,.1f} ({state.bytes / state.total_bytes:.0%})"
        words.append(f"{state.tokens:,} tokens")
        if state.duplicate_documents:
            words.append(f"{state.duplicate_documents:,} duplicates")
        words.append(f"{speed / 1e6:.1f} MB/s")
        if state.total_bytes and speed:
            left = max(state.total_bytes - state.bytes, 0) / speed
            words.append(f"eta {timedelta(seconds=round(left))}")
        return "  ".join(words)
