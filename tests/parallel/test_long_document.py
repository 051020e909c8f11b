"""A document of 262,144 bytes over four ranks: the step of one process, in a quarter of its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LENGTH = 262_144


def run(context: int) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(context)]
    command += ["-m", "tests.parallel.long_document", str(LENGTH), str(context)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        # What is freed goes back at once, or the peak would depend on what the allocator keeps.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_memory_is_a_quarter_and_the_step_the_same() -> None:
    whole, parts = run(1), run(4)
    assert parts["nats_per_token"] == pytest.approx(whole["nats_per_token"], rel=1e-5)
    assert parts["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-4)
    # A quarter, and what one layer works on while it finds its segment's summary and that one's gradient.
    assert parts["bytes"] < 0.3 * whole["bytes"]
