"""A gradient that is not finite skips the step on every rank; too many in a row stop the run, saved."""

from __future__ import annotations

import json

import pytest

from pretrain.checkpoint import CheckpointReader, newest_checkpoint
from tests.runs import raw_config, write_corpus

PROGRAMS = "tests.training.programs"

LAYOUTS = {
    "zero0": (1, {"zero": 0}),
    "data2_zero0": (2, {"zero": 0}),
    "data2_zero1": (2, {"zero": 1}),
    "data2_zero2": (2, {"zero": 2}),
    "data2_zero3": (2, {"zero": 3}),
    "tensor2_zero1": (2, {"tensor": 2, "zero": 1}),
    "pipeline2_zero0": (2, {"pipeline": 2, "zero": 0}),
    "pipeline2_zero1": (2, {"pipeline": 2, "zero": 1}),
}


def read_lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("layout", "value"), [*((layout, "nan") for layout in LAYOUTS), ("tensor2_zero1", "inf"), ("data2_zero2", "inf")]
)
def test_a_step_is_skipped_and_counted(layout, value, worker_pools, tmp_path):
    processes, parallel = LAYOUTS[layout]
    write_corpus(tmp_path / "corpus")
    raw = raw_config(tmp_path, parallel=parallel)
    raw["train"] |= {"steps": 5, "checkpoint_every": 1}
    broken = {"broken_steps": [3], "broken_rank": processes - 1, "value": value}
    ends = worker_pools(processes).run(PROGRAMS, "run_with_broken_gradients", raw=raw, **broken)
    assert ends == [None] * processes
    assert [line["skipped"] for line in read_lines(tmp_path / "run")] == [False, False, True, False, False]
    steps = {}
    for step in (2, 3, 4):
        with CheckpointReader(tmp_path / "run" / "checkpoints" / f"step-{step:08}") as reader:
            values = {
                (name, kind): reader.read(name, kind)
                for kind in ("weight", "exp_avg", "exp_avg_sq")
                for name in reader.names(kind)
            }
            steps[step] = values, reader.state["position"]["skipped_steps"]
    assert [steps[step][1] for step in (2, 3, 4)] == [0, 1, 1]
    assert all((steps[3][0][key] == value).all() for key, value in steps[2][0].items()), "a skipped step changed it"
    assert any((steps[4][0][key] != value).any() for key, value in steps[3][0].items()), "training went on"
    assert all(value.isfinite().all() for value in steps[4][0].values())


@pytest.mark.parametrize("layout", ["zero0", "data2_zero1"])
def test_too_many_in_a_row_stop_the_run_with_its_state_saved(layout, worker_pools, tmp_path):
    processes, parallel = LAYOUTS[layout]
    write_corpus(tmp_path / "corpus")
    raw = raw_config(tmp_path, parallel=parallel)
    raw["train"] |= {"max_skipped_steps": 2, "checkpoint_every": 0}
    broken = {"broken_steps": [2, 4, 5], "broken_rank": 0}
    ends = worker_pools(processes).run(PROGRAMS, "run_with_broken_gradients", raw=raw, **broken)
    assert all("2 steps in a row had no finite gradient" in end for end in ends)
    with CheckpointReader(newest_checkpoint(tmp_path / "run" / "checkpoints")) as reader:
        assert reader.step == 5
        assert reader.state["position"]["skipped_steps"] == 3
