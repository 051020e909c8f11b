"""Programs that run on every rank of a pool of workers."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from pretrain.observe import slow_ranks
from pretrain.parallel.topology import build_topology
from tests.configurations import tiny_config


def slow_rank(parallel: dict[str, Any], waits: str) -> list[str]:
    """What ranks say of themselves where rank 1 takes a tenth of a second a step longer."""
    config = tiny_config(parallel=parallel)
    slow = slow_ranks.SlowRanks(config, build_topology(config))
    said: list[str] = []
    for step in range(slow_ranks.STEPS):
        for kind in ("reading data", "forward and backward"):
            with slow.measure(kind):
                if kind == waits and dist.get_rank() == 1 and step < 2:
                    time.sleep(0.1 * slow_ranks.STEPS / 2)
        said += slow.finish_step()
    return said
