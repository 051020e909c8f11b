"""A profile of a few steps: real operations, phases that add up to the step, a trace for each rank, no run touched."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pretrain import cli
from pretrain.observe.profile import PHASES, Operation, Profile, operations_of
from pretrain.observe.profile_report import print_profile
from tests.runs import raw_config, write_corpus

PROGRAMS = "tests.observe.programs"


@pytest.mark.parametrize("parallel", [{"zero": 1}, {"tensor": 2, "zero": 0}], ids=["one process", "tensor2"])
def test_operations_phases_and_traces(parallel, worker_pools, tmp_path):
    write_corpus(tmp_path / "corpus")
    processes = parallel.get("tensor", 1)
    raw = raw_config(tmp_path, parallel=parallel)
    measured, *others = worker_pools(processes).run(
        PROGRAMS, "profile", raw=raw, steps=2, output=str(tmp_path / "profile")
    )
    assert others == [None] * (processes - 1)
    assert list(measured["phases"]) == list(PHASES) and all(seconds > 0 for seconds in measured["phases"].values())
    operations = {operation["name"]: operation for operation in measured["operations"]}
    assert any(name in operations for name in ("aten::mm", "aten::addmm", "aten::linear"))
    assert not any(name.startswith("phase: ") for name in operations)
    assert sum(operation["share"] for operation in operations.values()) == pytest.approx(1)
    shares = [operation["share"] for operation in measured["operations"]]
    assert shares == sorted(shares, reverse=True)
    assert measured["steps"] == 2 and measured["tokens_per_step"] == 4 * 32
    for rank in range(processes):
        events = json.loads((tmp_path / "profile" / f"trace-rank-{rank}.json").read_text())["traceEvents"]
        names = {event.get("name") for event in events}
        assert {f"phase: {phase}" for phase in PHASES} <= names
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        f"trace-rank-{rank}.json" for rank in range(processes)
    ]
    assert not (tmp_path / "run").exists()


def test_tables_show_the_longest_operations_first(capsys):
    operations = [Operation("aten::mm", 6, 0.03, 0.0, 0.75), Operation("aten::" + "x" * 80, 2, 0.01, 0.0, 0.25)]
    phases = dict(zip(PHASES, (0.001, 0.004, 0.004, 0.001, 0.0), strict=True))
    print_profile(Profile("cpu", 2, 1000, phases, operations, ["out/trace-rank-0.json"]), 1, Console(width=120))
    shown = capsys.readouterr().out
    assert "10.0 ms a step, 100,000 tokens/s" in shown and "40.0%" in shown
    assert "aten::mm" in shown and "15.000" in shown and "75.0%" in shown and "xxx" not in shown
    assert "out/trace-rank-0.json" in shown


def test_shares_are_of_the_operations_own_time():
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function("phase: forward"):
            first = torch.randn(64, 64)
            for _ in range(3):
                first = first @ first
    found = {operation.name: operation for operation in operations_of(profiler, on_device=False)}
    assert found["aten::mm"].calls == 3
    assert "phase: forward" not in found
    assert sum(operation.cpu_seconds for operation in found.values()) > 0


def test_a_layout_that_does_not_fit_is_refused_before_anything_is_made(tmp_path):
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(tmp_path, parallel={"tensor": 2})))
    ended = CliRunner().invoke(cli.app, ["profile", str(path), "--out", str(tmp_path / "profile")])
    assert "1 processes cannot hold parallel.tensor=2" in str(ended.exception)
    assert not (tmp_path / "profile").exists()
