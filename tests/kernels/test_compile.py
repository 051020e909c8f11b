"""Kernels compile for GPUs that are not here, within their limits.

Compilation runs in a process of its own, because the interpreter that other tests need replaces the compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import compile as ahead_of_time
from kernels.launch import interpreter_is_active

ROOT = Path(__file__).parents[2]

# Shared memory that one program may use, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


def compile_in_process(*arguments, cache):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, "-m", "kernels.compile", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def check(row):
    assert row["cubin_bytes"] > 0
    assert 0 < row["registers"] <= 255
    assert row["spill_bytes"] == 0, f"{row['kernel']} spills on {row['target']}"
    assert row["shared_bytes"] <= SHARED_LIMIT[row["target"]]


def test_state_kernel_compiles_for_every_target(tmp_path):
    done = compile_in_process("--kernels", "state_kernel", "--json", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["target"] for row in rows] == list(ahead_of_time.TARGETS)
    for row in rows:
        check(row)


@pytest.mark.slow
def test_all_kernels_compile_without_spills(tmp_path):
    done = compile_in_process("--json", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    names = {launch.kernel.__name__ for launch in ahead_of_time.registered_launches()}
    assert len(rows) == len(names) * len(ahead_of_time.TARGETS)
    for row in rows:
        check(row)


def test_unknown_kernel_is_named_with_the_known_ones(capsys):
    assert ahead_of_time.main(["--kernels", "stat_kernel"]) == 2
    message = capsys.readouterr().err
    assert "'stat_kernel'" in message and "state_kernel" in message


def test_bad_target_is_refused(capsys):
    assert ahead_of_time.main(["--kernels", "boundary_scan_kernel", "--targets", "h100"]) == 1
    message = capsys.readouterr().err
    assert "sm_90" in message and "h100" in message


def test_registered_launches_cover_every_argument():
    for launch in ahead_of_time.registered_launches():
        given = set(launch.arguments) | set(launch.constants)
        assert given == set(launch.kernel.arg_names), launch.kernel


def test_compiling_under_the_interpreter_is_refused():
    if not interpreter_is_active():
        pytest.skip("the interpreter is used only without a GPU")
    launch = ahead_of_time.registered_launches()[0]
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        ahead_of_time.compile_launch(launch, "sm_90")


def test_table_aligns_columns():
    row = dict(zip(ahead_of_time.COLUMNS, ("k", "sm_90", 8, 0, 1024, 99), strict=True))
    header, line = ahead_of_time.format_table([row]).splitlines()
    assert header.split() == list(ahead_of_time.COLUMNS)
    assert line.split() == ["k", "sm_90", "8", "0", "1024", "99"]
    assert len(line) == len(header)
