"""Processes of this machine that form one group, for ``bench context``: started once and asked again and again."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# After one rank has failed, the others may wait for it for ever.
_SECONDS_AFTER_A_FAILURE = 10
_TIMEOUT = timedelta(minutes=10)
_DIES_WITH_ITS_PARENT = 1  # PR_SET_PDEATHSIG of Linux
# Imports torch and Megatron-core, which takes seconds.
_FUNCTIONS = "pretrain.bench.context_steps"


@dataclass
class Place:
    """Where a process stands.

    Attributes:
        rank, size: in its group.
        device: that it computes on, ``cpu`` or ``cuda``.
        held: what a request has left for later ones.
    """

    rank: int
    size: int
    device: str
    held: dict[str, Any] = field(default_factory=dict)


def synchronise(device: str) -> None:
    """Waits until a GPU has done what it was asked; a CPU has."""
    if device == "cuda":
        torch.cuda.synchronize()


def take_turn(place: Place, name: str) -> tuple[float, float, float]:
    """Runs ``place.held[name]`` once, beginning together with the other ranks.

    Returns:
        When this rank began and ended, in seconds of a clock that all processes of the machine share, and the
        processor time of its threads in between.
    """
    step = place.held[name]
    dist.barrier()
    synchronise(place.device)
    start, processor = time.perf_counter(), time.process_time()
    step.run()
    synchronise(place.device)
    return start, time.perf_counter(), time.process_time() - processor


def _die_with_the_parent() -> None:
    """Ends this process when its parent is killed, also while it is stopped."""
    ctypes.CDLL(None).prctl(_DIES_WITH_ITS_PARENT, signal.SIGKILL)
    # A fork server is the parent of those that it has started. It ends when nobody holds this descriptor any more,
    # which they inherit.
    held = getattr(forkserver._forkserver, "_forkserver_alive_fd", None)
    if held is not None:
        os.close(held)
        forkserver._forkserver._forkserver_alive_fd = None


def _serve(rank: int, size: int, device: str, threads: int, rendezvous: str, requests: Connection) -> None:
    _die_with_the_parent()
    # Ctrl-C reaches the parent too, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(rendezvous, size)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    place = Place(rank, size, device)
    # The parent may be gone.
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            requests.send(_answer(place, *requests.recv()))


def _answer(place: Place, function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[bool, Any]:
    """Whether it succeeded, and what it returned or its traceback."""
    try:
        return True, function(place, **arguments)
    except Exception:
        return False, traceback.format_exc()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Processes that are started meanwhile do not warn of packages that Megatron-core looks for and nothing needs."""
    given = os.environ.get("PYTHONWARNINGS")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")
    try:
        yield
    finally:
        if given is None:
            del os.environ["PYTHONWARNINGS"]


class Processes:
    """``size`` processes in one group; :meth:`call` runs a function on all of them, :meth:`close` ends them.

    Between calls processes on a CPU are stopped: gloo's threads look for messages all the time, also when nobody
    sends any, and would take time from the processes whose turn it is.
    """

    def __init__(self, size: int, device: str = "cpu", threads: int = 1):
        self.size, self._stops = size, device == "cpu"
        self._directory = tempfile.TemporaryDirectory()
        # Copies of a process that has imported everything start at once; CUDA's libraries do not survive that.
        context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        if device == "cpu":
            context.set_forkserver_preload([_FUNCTIONS])
        rendezvous = str(Path(self._directory.name) / "rendezvous")
        self._connections, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, device, threads, rendezvous, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            with _without_warnings():
                process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """What ``function(place, **arguments)`` returns on each rank; it and they are pickled.

        Raises:
            RuntimeError: with the traceback of the ranks that failed.
        """
        self._signal(signal.SIGCONT)
        for connection in self._connections:
            connection.send((function, arguments))
        answers: list[Any] = [None] * self.size
        waiting, failures = dict(zip(self._connections, range(self.size), strict=True)), []
        while waiting:
            ready = wait(list(waiting), _SECONDS_AFTER_A_FAILURE if failures else None)
            if not ready:
                failures += [f"rank {rank} of {self.size} did not answer" for rank in waiting.values()]
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    succeeded, answers[rank] = connection.recv()
                except EOFError:
                    succeeded, answers[rank] = False, "the process ended"
                if not succeeded:
                    failures.append(f"rank {rank} of {self.size}: {answers[rank]}")
        if failures:
            self.close()
            raise RuntimeError("\n".join(failures))
        self._signal(signal.SIGSTOP)
        return answers

    def _signal(self, number: int) -> None:
        for process in self._processes if self._stops else ():
            if process.is_alive():
                os.kill(process.pid, number)

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
        for connection, process in zip(self._connections, self._processes, strict=True):
            process.join()
            connection.close()
        self._connections, self._processes = [], []
        self._directory.cleanup()
