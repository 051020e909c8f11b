"""Programs that run on every rank of a pool of workers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.config import parse_config
from pretrain.observe import slow_ranks
from pretrain.observe.profile import profile_run
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


def profile(raw: dict[str, Any], steps: int, output: str) -> dict[str, Any] | None:
    """What is measured of a run, as JSON holds it; None on ranks other than 0."""
    measured = profile_run(parse_config(raw, "test"), steps, 1, Path(output))
    return None if measured is None else measured.to_dict(1000)
