"""Each parameter learns at its own multiple of the run's rate, under every ZeRO stage."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parallel.test_parity import LAYOUTS

PROGRAMS = "tests.parallel.hnet_programs"
RATE = 1e-3
FACTORS = {"outer": 2.0, "middle": 0.5, "inner": 0.25}


def _stage_of(name: str) -> str:
    if name.startswith(("layers.", "inner_norm.", "stages.1.widen.")):
        return "inner"
    return "middle" if name.startswith(("stages.1.", "stages.0.widen.")) else "outer"


@pytest.mark.parametrize("layout", ["tensor2", "zero1", "data2_zero1", "data2_zero2", "data2_zero3"])
def test_first_steps_are_as_long_as_the_rate_says(layout: str, worker_pools) -> None:
    processes, parallel = LAYOUTS[layout]
    results = worker_pools(processes).run(
        PROGRAMS, "first_steps", parallel=parallel, rate=RATE, factors=list(FACTORS.values())
    )
    # Adam's first step is the sign of the gradient times the rate, where the gradient is not tiny.
    longest: dict[str, list[float]] = {stage: [] for stage in FACTORS}
    for name, length in results[0].items():
        longest[_stage_of(name)].append(length)
    for stage, factor in FACTORS.items():
        assert len(longest[stage]) >= 10
        np.testing.assert_allclose(longest[stage], RATE * factor, rtol=2e-2, err_msg=stage)
