"""``bench checkpoint`` at a tiny size: every way saves what is trained, rows and their sums; never how fast it is."""

from __future__ import annotations

import io
import json
import math
import shutil
from typing import Any

import pytest
from rich.console import Console

from pretrain.bench import checkpoint
from pretrain.bench.checkpoint import CheckpointBenchmark, bench_checkpoint, config_of, parse_count, table
from pretrain.bench.checkpoint_rank import SaveTimings
from pretrain.config import parse_config
from pretrain.errors import InputError
from pretrain.plan import plan

PROGRAMS = "tests.bench.checkpoint_programs"
OURS = ["ours, synchronous", "ours, asynchronous"]
PEERS = ["DeepSpeed save_checkpoint", "torch DCP save", "torch DCP async_save"]


def small(ranks: int) -> dict[str, Any]:
    raw, _ = config_of(1, ranks)
    raw["model"]["num_layers"] = 1
    return raw


def test_every_way_saves_the_weights(worker_pools, tmp_path):
    rows, others = worker_pools(2).run(PROGRAMS, "measure", raw=small(2), rounds=1, directory=str(tmp_path))
    # Seconds of the slowest rank, so all agree.
    assert rows == others
    assert [row["name"] for row in rows] == OURS + PEERS
    assert not list(tmp_path.iterdir())
    parameters = plan(parse_config(small(2), "test")).parameters
    for row in rows:
        assert len(row["stall"]) == len(row["slower"]) == len(row["complete"]) == len(row["undisturbed_step"]) == 1
        for stall, complete in zip(row["stall"], row["complete"], strict=True):
            assert 0 < stall <= complete and math.isfinite(complete)
        assert all(steps >= 1 for steps in row["steps"])
        assert len(row["extra_memory"]) == 2 and all(extra is None or extra >= 0 for extra in row["extra_memory"])
        # Weights and both moments, in float32.
        assert all(written > 12 * parameters for written in row["written"])


def test_a_checkpoint_of_other_weights_is_noticed(worker_pools, tmp_path):
    raw, directory = small(1), str(tmp_path)
    (message,) = worker_pools(1).run(PROGRAMS, "measure_a_save_that_comes_too_late", raw=raw, directory=directory)
    assert "torch DCP save" in message and "not those that were saved" in message


def test_the_table_and_the_ratio():
    def row(name: str, stall: float, extra: int | None) -> SaveTimings:
        return SaveTimings(name, True, [stall, 1.0, 9.0], [0.5] * 3, [stall] * 3, [1] * 3, [2.0] * 3, [extra], [10**9])

    rows = (row(OURS[0], 6.0, 2**31), row(OURS[1], 1.0, None), row(PEERS[0], 3.0, 0))
    result = CheckpointBenchmark(2 * 10**8, 2, 1, rows)
    assert result.stall_ratio() == 6.0
    console = Console(file=io.StringIO(), width=200)
    console.print(table(result))
    text = console.file.getvalue()
    assert "6.00 (1.00 .. 9.00)" in text and "not known" in text and all(row.name in text for row in rows)
    assert json.loads(json.dumps(result.to_dict()))["rows"][OURS[1]]["stall"] == [1.0, 1.0, 9.0]


@pytest.mark.parametrize("parameters", [10**6, 2 * 10**8])
def test_the_model_has_about_so_many_parameters(parameters):
    raw, actual = config_of(parameters, ranks=2)
    assert actual == plan(parse_config(raw, "test")).parameters
    assert actual == pytest.approx(parameters, rel=0.35 if parameters < 10**7 else 0.05)


def test_counts():
    assert [parse_count(text) for text in ("200M", "1.3B", "500k", "7")] == [200_000_000, 1_300_000_000, 500_000, 7]
    for wrong in ("", "many", "-3M", "0", "2MM"):
        with pytest.raises(InputError, match="expected a number of parameters"):
            parse_count(wrong)


def test_a_place_without_room_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is not a directory"):
        bench_checkpoint(10**6, 1, 1, tmp_path / "none", None)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match="has 1 B free"):
        bench_checkpoint(10**6, 1, 1, tmp_path, None)
