"""Stopping in good order: the first signal asks, training finishes its step, saves and ends."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# A launcher passes a Ctrl-C on that its workers got from the terminal already; both are one wish.
SECONDS_OF_ONE_WISH = 2.0


class StopRequest:
    """While entered, remembers a signal instead of dying of it.

    A second Ctrl-C, given on purpose (later than the copy that a launcher passes on), interrupts at once.
    After leaving, the earlier handlers are back.

    Args:
        process_ends: whether the process ends once this is left without an error. Then signals are ignored to its end:
            all is saved, and one that comes late (a batch system's warning, say) must not replace the exit code. Python
            itself would put back the system's own handlers, which end the process, before it has ended.
    """

    def __init__(self, process_ends: bool = False) -> None:
        self.process_ends = process_ends
        self.received: signal.Signals | None = None
        self._when = 0.0
        self._earlier: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in HANDLED:
            self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_IGN if self.process_ends and kind is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._when = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._when > SECONDS_OF_ONE_WISH:
            raise KeyboardInterrupt
