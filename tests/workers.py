"""A pool of processes joined by gloo, kept for the whole test run: importing torch, Megatron-core and DeepSpeed
takes seconds, so distributed tests share processes and rebuild only their groups, and the processes are forks of one
that has imported them."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import signal
import tempfile
import traceback
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

# Longer than any program takes here; what is slower hangs.
SECONDS_TO_ANSWER = 240

ROOT = Path(__file__).parents[1]

# Brings torch, Megatron-core and DeepSpeed along.
IMPORTED_ONCE = ["pretrain.train", "pretrain.cli"]


class WorkerError(AssertionError):
    """A program failed, or did not answer, on some rank."""


@functools.cache
def start_methods() -> tuple[BaseContext, BaseContext]:
    """How processes start: anew, and forked from a server that has imported :data:`IMPORTED_ONCE`.

    Both are the first where there is a GPU, which a fork of a process that has looked at it cannot use.
    """
    spawned = multiprocessing.get_context("spawn")
    if Path("/dev/nvidiactl").exists():
        return spawned, spawned
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(IMPORTED_ONCE)
    path = os.environ.get("PYTHONPATH")
    # The server looks for modules as a new process does, wherever the tests were started.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([path] if path else [])])
    forkserver.ensure_running()
    if path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = path
    return spawned, forked


def _serve(rank: int, world_size: int, rendezvous: str, requests: Connection) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _share_one_device()
    store = dist.FileStore(rendezvous, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    while True:
        module, function, arguments = requests.recv()
        try:
            answer = (True, getattr(importlib.import_module(module), function)(**arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        requests.send(answer)


def _share_one_device() -> None:
    """One thread that watches the connections of all of a process's groups, instead of one for each group.

    Each such thread looks a hundred times a second, and Megatron-core makes dozens of groups.
    """
    from torch.distributed import distributed_c10d

    device = distributed_c10d.ProcessGroupGloo.create_default_device()

    class GlooOnOneDevice(distributed_c10d.ProcessGroupGloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            options = distributed_c10d.ProcessGroupGloo._Options()
            options._devices, options._timeout, options._threads = [device], timeout, 2
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = GlooOnOneDevice


class WorkerPool:
    """``world_size`` processes; :meth:`run` calls one function on all of them.

    Between calls the processes are stopped: gloo's threads look for messages all the time, also when nobody sends any.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.directory = tempfile.TemporaryDirectory()
        spawned, forked = start_methods()
        rendezvous = str(Path(self.directory.name) / "rendezvous")
        self.connections, self.processes = [], []
        for rank in range(world_size):
            # Forks share a hash seed. Ranks that a launcher starts do not, so what depends on the order of a set
            # must differ between two of them here too.
            context = spawned if (world_size, rank) == (2, 0) else forked
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, module: str, function: str, **arguments: Any) -> list[Any]:
        """What ``module.function(**arguments)`` returned on each rank.

        Raises:
            WorkerError: with the traceback of the ranks that failed.
        """
        self._signal(signal.SIGCONT)
        for connection in self.connections:
            connection.send((module, function, arguments))
        answers, failures = [], []
        for rank, connection in enumerate(self.connections):
            # After one rank has failed, the others may wait for it for ever.
            if not connection.poll(10 if failures else SECONDS_TO_ANSWER):
                failures.append(f"rank {rank} did not answer")
                continue
            try:
                succeeded, answer = connection.recv()
            except EOFError:
                succeeded, answer = False, "the process died"
            answers.append(answer)
            if not succeeded:
                failures.append(f"rank {rank}: {answer}")
        if failures:
            self.close()
            raise WorkerError("\n".join(failures))
        self._signal(signal.SIGSTOP)
        return answers

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    @property
    def is_alive(self) -> bool:
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        """Ends the processes; they hold nothing that is worth the seconds in which dozens of groups are taken down."""
        for connection, process in zip(self.connections, self.processes, strict=True):
            process.kill()
            process.join(timeout=20)
            connection.close()
        self.connections, self.processes = [], []
        self.directory.cleanup()
