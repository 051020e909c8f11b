"""Segments of a sequence on threads of one process, which pass tensors as ranks do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.segments import Arriving, Segments


class _Meeting:
    """Where threads put what they send; one that fails lets the others go on to fail too."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size

    def swap(self, rank: int, sent: Any) -> list[Any]:
        """What every thread sent in this call."""
        self.slots[rank] = sent
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class ThreadSegments(Segments):
    """One thread's segment."""

    def __init__(self, rank: int, size: int, scheme: str, meeting: _Meeting):
        super().__init__(rank, size, scheme)
        self.meeting = meeting

    def _all_gather(self, tensor: Tensor) -> Arriving:
        return Arriving(torch.stack(self.meeting.swap(self.rank, tensor)))

    def _all_to_all(self, parts: Tensor) -> Arriving:
        return Arriving(torch.stack([sent[self.rank] for sent in self.meeting.swap(self.rank, parts)]))

    def _send_and_receive(self, tensor: Tensor, target: int | None, source: int | None) -> Arriving:
        sent = self.meeting.swap(self.rank, (target, tensor.clone()))
        if source is None:
            assert not any(to == self.rank for to, _ in sent), "a message that nobody waits for"
            return Arriving(None)
        assert sent[source][0] == self.rank, "waits for a message that nobody sends"
        return Arriving(sent[source][1])


def on_segments(size: int, scheme: str, work: Callable[[Segments], Any]) -> list[Any]:
    """What ``work`` returns on each of ``size`` threads."""
    meeting = _Meeting(size)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadSegments(rank, size, scheme, meeting))
        except BaseException as failure:
            failures.append(failure)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    broken = [failure for failure in failures if not isinstance(failure, threading.BrokenBarrierError)]
    if failures:
        raise (broken or failures)[0]
    return results
