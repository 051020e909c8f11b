"""What tests start ends with them, also where they fail."""

from __future__ import annotations

import subprocess

import psutil
import pytest

from tests.runs import started


def test_a_test_that_fails_leaves_no_process() -> None:
    with pytest.raises(AssertionError, match="it failed"):
        with started(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE) as process:
            child = psutil.Process(int(process.stdout.readline()))
            assert child.is_running(), "it never began"
            raise AssertionError("it failed")
    assert process.returncode == -9
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert gone == [child] and not alive
