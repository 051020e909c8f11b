"""Fixtures that several test folders share."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# One thread a process: the tests run several processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton decides when it is first imported, in whichever test that happens, whether kernels are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Iterator  # noqa: E402

import pytest  # noqa: E402

from tests.workers import WorkerPool  # noqa: E402


def pytest_collection_finish() -> None:
    """What has been imported stays; the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Else the interpreter would end with what it has not looked through."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def worker_pools() -> Iterator[Callable[[int], WorkerPool]]:
    """``worker_pools(world_size)``: the shared pool of that many processes."""
    pools: dict[int, WorkerPool] = {}

    def pool(world_size: int) -> WorkerPool:
        if world_size not in pools or not pools[world_size].is_alive:
            pools[world_size] = WorkerPool(world_size)
        return pools[world_size]

    yield pool
    for running in pools.values():
        running.close()
