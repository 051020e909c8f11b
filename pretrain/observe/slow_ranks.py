"""Which ranks hold the others up: found by comparing the times of what they do before they wait for each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist

from pretrain.config.schema import Config
from pretrain.parallel.topology import Topology

# Steps of which one comparison is made, and what makes one of them worth a word: so many times the median, and so many
# seconds a step more than it.
STEPS, FACTOR, SECONDS = 50, 1.5, 0.01

Kind = Literal["reading data", "forward and backward"]


class SlowRanks:
    """Times of this rank, compared with those of all others every :data:`STEPS` steps.

    Reading is compared between ranks. Forward and backward passes are compared between replicas of the model, each of
    which is as slow as its slowest rank, since tensor, pipeline and context parallelism make its ranks wait for each
    other within them; and only where replicas wait for each other behind them, not within (ZeRO 2 and 3, experts on
    several ranks).
    """

    def __init__(self, config: Config, topology: Topology):
        parallel = config.parallel
        self.topology = topology
        self.compares_passes = topology.data_size > 1 and parallel.zero < 2 and parallel.expert == 1
        self._seconds: dict[Kind, float] = {"reading data": 0.0, "forward and backward": 0.0}
        self._steps = 0

    @contextmanager
    def measure(self, kind: Kind) -> Iterator[None]:
        """Adds the time within to this rank's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[kind] += time.perf_counter() - began

    def finish_step(self) -> list[str]:
        """What there is to say after this step, the same on all ranks; they all call it."""
        self._steps += 1
        if self._steps < STEPS or self.topology.world_size == 1:
            return []
        own = [self._seconds["reading data"], self._seconds["forward and backward"], float(self.topology.data_rank)]
        everyone = torch.empty(self.topology.world_size, len(own), dtype=torch.float64, device=self.topology.device)
        mine = torch.tensor(own, dtype=torch.float64, device=self.topology.device)
        dist.all_gather(list(everyone.unbind()), mine)
        reading, passes, replicas = everyone.t().tolist()
        said = compared("reading data", [time / self._steps for time in reading], "rank")
        if self.compares_passes:
            slowest = [
                max(time for time, of in zip(passes, replicas, strict=True) if of == replica)
                for replica in range(self.topology.data_size)
            ]
            said += compared("forward and backward", [time / self._steps for time in slowest], "data-parallel rank")
        self._steps, self._seconds = 0, dict.fromkeys(self._seconds, 0.0)
        return said


def compared(what: str, seconds: Sequence[float], whose: str) -> list[str]:
    """A sentence for each that takes far longer than the median.

    Args:
        what: they do.
        seconds: of each, a step.
        whose: what is counted by the index.
    """
    # The lower one of two: half of the ranks can be slow.
    median = statistics.median_low(seconds)
    return [
        f"{whose} {index} takes {time:.3f} s a step for {what}, the median {median:.3f} s: the others wait for it"
        for index, time in enumerate(seconds)
        if time > FACTOR * median and time > median + SECONDS
    ]
