"""Stopping in good order: the first signal asks, training finishes its step, saves and ends."""

from __future__ import annotations

import signal
import time
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# A launcher passes a Ctrl-C on that its workers got from the terminal already; both are one wish.
SECONDS_OF_ONE_WISH = 2.0


class StopRequest:
    """While entered, remembers a signal instead of dying of it.

    A second Ctrl-C, given on purpose (later than the copy that a launcher passes on), interrupts at once.
    After leaving, the earlier handlers are back.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._when = 0.0
        self._earlier: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in HANDLED:
            self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._when = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._when > SECONDS_OF_ONE_WISH:
            raise KeyboardInterrupt
