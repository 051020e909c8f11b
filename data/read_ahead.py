"""The next batch is read while the model works on this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Read = TypeVar("Read")


class ReadAhead(Generic[Read]):
    """Reads by a position, in one thread, so that never two reads run at once."""

    def __init__(self, read: Callable[[int], Read]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reads ahead")
        self._ahead: tuple[int, Future[Read]] | None = None

    def take(self, position: int, following: int | None) -> Read:
        """What is read at ``position``; then begins to read at ``following``, unless that is None.

        Raises what reading at ``position`` raises.
        """
        asked, future = self._ahead or (None, None)
        if asked != position or future is None:
            future = self._thread.submit(self._read, position)
        self._ahead = None
        found = future.result()
        if following is not None:
            self._ahead = (following, self._thread.submit(self._read, following))
        return found

    def close(self) -> None:
        """Waits for what is being read, and ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
