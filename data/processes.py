"""Processes that tokenize behind this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# The processes are the parallelism: threads within each would fight over the same cores.
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def start_processes(workers: int, initializer: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """At most ``workers`` processes, each begun when there is work for it, and each with ``initializer`` called in it.

    They are new programs, not forks: a fork would copy the state of torch's and the tokenizers' own threads, which may
    hold locks. They end when this process does, however it ends, and leave Ctrl-C to it.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _begin, (initializer, arguments))


def usable_cores() -> int:
    """Cores that this process may keep busy: by its affinity, and by the quota of its container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def _begin(initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(_ONE_THREAD)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*arguments)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
