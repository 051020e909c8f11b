"""Notices that a run hangs: says which rank, in which phase of which step, writes all stacks, and ends the process.

A rank that stopped answering leaves the others waiting in a collective call, which nothing but the backend's time limit
ends, and that says nothing about the cause. Each process has a thread that watches its own progress and writes a
heartbeat to the run directory, so that a process can tell of the others which are behind and which are gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from pretrain.errors import EXIT_HUNG
from pretrain.observe.metrics import replace_file

HEARTBEATS, STACKS = "heartbeats", "hung"
# Heartbeats and looks at the clock in the time without progress that is allowed, and the longest between two.
LOOKS, LONGEST_PAUSE = 20, 30.0
# Once a process has seen that the run hangs, how long it waits for others to see it too and to write their stacks.
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said of itself.

    Attributes:
        rank, process: who says it.
        step: that is being computed, from 1.
        count: how many phases it has begun; the rank with fewest is the one that others wait for.
        phase: what it is doing.
        heard: seconds since the epoch when the heartbeat was written.
    """

    rank: int
    process: int
    step: int
    count: int
    phase: str
    heard: float


class Watchdog:
    """Watches one rank while it is entered; every phase that begins is progress."""

    def __init__(
        self,
        run: Path,
        rank: int,
        world_size: int,
        seconds: float | None,
        end: Callable[[int], None] = os._exit,
    ):
        """
        Args:
            run: run directory, the same on all ranks.
            seconds: without progress, after which the run counts as hung; None: never.
            end: ends the process at once, with an exit code: nothing can be unwound below a call that never returns.
        """
        self.rank, self.world_size, self.seconds, self.end = rank, world_size, seconds, end
        self.heartbeats, self.stacks = run / HEARTBEATS, run / STACKS
        self._lock = threading.Lock()
        self._step, self._count, self._phase, self._since = 0, 0, "starting", time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, step: int, phase: str) -> None:
        """Says that this rank begins a phase of a step; costs no call to the system."""
        with self._lock:
            self._step, self._phase, self._since = step, phase, time.monotonic()
            self._count += 1

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            self._since = time.monotonic()
            try:
                self.heartbeats.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self._say(f"cannot write heartbeats: {error.strerror or error}")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._file(self.rank).unlink(missing_ok=True)
            try:
                self.heartbeats.rmdir()
            except OSError:
                # Others are not done yet; the last one removes it.
                return

    def _file(self, rank: int) -> Path:
        return self.heartbeats / f"rank-{rank:05}.json"

    def _watch(self) -> None:
        pause = min(LONGEST_PAUSE, self.seconds / LOOKS)
        while not self._stop.wait(pause):
            with self._lock:
                idle = time.monotonic() - self._since
                own = Heartbeat(self.rank, os.getpid(), self._step, self._count, self._phase, time.time())
            try:
                replace_file(self._file(self.rank), json.dumps(asdict(own)).encode(), durable=False)
            except OSError as error:
                # A full disk is reported where it costs data; a run is not ended for its heartbeat.
                self._say(f"cannot write a heartbeat: {error.strerror or error}")
            if idle > self.seconds:
                self._give_up(own, idle, pause)
                return

    def _give_up(self, own: Heartbeat, idle: float, pause: float) -> None:
        others = self._others(own)
        self._say(
            f"rank {own.rank} has made no progress for {idle:,.0f} s in step {own.step} ({own.phase}); "
            f"{describe(own, others, self.world_size, 3 * pause)}"
        )
        try:
            self.stacks.mkdir(exist_ok=True)
            path = self.stacks / f"rank-{self.rank:05}.txt"
            with path.open("w", encoding="utf-8") as file:
                file.write(f"process {own.process}, step {own.step}, {own.phase}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self._say(f"the stacks of its threads are in {path}")
        except OSError as error:
            self._say(f"cannot write its stacks: {error.strerror or error}")
            faulthandler.dump_traceback(all_threads=True)
        # The launcher kills all processes once one has ended; those that see the same a moment later have a say too.
        time.sleep(min(GRACE_SECONDS, 2 * pause))
        self.end(EXIT_HUNG)

    def _others(self, own: Heartbeat) -> dict[int, Heartbeat]:
        found = {own.rank: own}
        for file in self.heartbeats.glob("rank-*.json"):
            try:
                beat = Heartbeat(**json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue
            # Of an earlier start there may be more.
            if beat.rank < self.world_size:
                found.setdefault(beat.rank, beat)
        return found

    def _say(self, text: str) -> None:
        # Nor may a log that cannot be written keep a process that hangs from its end.
        with contextlib.suppress(OSError):
            print(f"watchdog: {text}", file=sys.stderr, flush=True)


def describe(own: Heartbeat, beats: dict[int, Heartbeat], world_size: int, stale: float) -> str:
    """Which ranks the others wait for, in one sentence.

    Args:
        own: heartbeat of the rank that asks; its clock is the one that others' are compared with.
        beats: of all ranks that left one.
        world_size: how many there are.
        stale: seconds after which a rank that has not been heard of counts as stopped or gone.
    """
    silent = [
        f"rank {rank} was never heard of"
        if rank not in beats
        else f"rank {rank} has not been heard of for {own.heard - beats[rank].heard:,.0f} s, since step "
        f"{beats[rank].step} ({beats[rank].phase}): its process (pid {beats[rank].process}) is stopped or gone"
        for rank in range(world_size)
        if rank not in beats or own.heard - beats[rank].heard > stale
    ]
    if silent:
        return "; ".join(silent)
    fewest = min(beat.count for beat in beats.values())
    behind = [beat for beat in beats.values() if beat.count == fewest]
    if len(behind) == world_size:
        return "all ranks are in the same phase, so it is a call in which they wait for each other"
    names = ", ".join(f"rank {beat.rank} in step {beat.step} ({beat.phase})" for beat in behind)
    return f"the others wait for {names}"
