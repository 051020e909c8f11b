"""Hierarchies with experts in every network take the same steps however the batch is cut and wherever experts are.

Ranks of an expert-parallel group have different numbers of chunks, and so exchange different numbers of rows.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.expert_models import expert_model
from tests.parallel.test_parity import assert_same_run

STEPS = 2
PROGRAMS: dict[str, dict[str, Any]] = {
    "hnet": {"module": "tests.parallel.hnet_programs", "function": "hnet_steps", "stages": 2},
    "hat": {"module": "tests.parallel.hat_programs", "function": "hat_steps"},
}
# (hierarchy, processes, parallel section, train section); the reference is one process with the whole batch at once.
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "hnet_micro_batches_recomputed": ("hnet", 1, {"zero": 1}, {"micro_batch_size": 2, "recompute": "block"}),
    "hnet_expert2_zero1": ("hnet", 2, {"expert": 2, "zero": 1}, {"micro_batch_size": 2}),
    "hnet_expert2_zero2_recomputed": (
        "hnet",
        2,
        {"expert": 2, "zero": 2},
        {"micro_batch_size": 2, "recompute": "block"},
    ),
    "hnet_data2_zero3": ("hnet", 2, {"zero": 3}, {"micro_batch_size": 4}),
    "hnet_expert2_tensor2_zero1": ("hnet", 4, {"expert": 2, "tensor": 2, "zero": 1}, {"micro_batch_size": 2}),
    "hat_expert2_zero0": ("hat", 2, {"expert": 2, "zero": 0}, {"micro_batch_size": 2}),
    "hat_expert2_tensor2_zero2": ("hat", 4, {"expert": 2, "tensor": 2, "zero": 2}, {"micro_batch_size": 4}),
}


@pytest.fixture(scope="module")
def run(worker_pools):
    def train(kind: str, processes: int, parallel: dict[str, Any], train: dict[str, Any]) -> list[dict[str, Any]]:
        overrides = {"parallel": parallel, "train": train}
        return worker_pools(processes).run(**PROGRAMS[kind], overrides=overrides, steps=STEPS, model=expert_model(kind))

    return train


@pytest.fixture(scope="module")
def at_once(run) -> dict[str, list[dict[str, Any]]]:
    return {kind: run(kind, 1, {"zero": 0}, {"micro_batch_size": 8}) for kind in PROGRAMS}


@pytest.mark.parametrize("case", CASES)
def test_same_as_the_whole_batch_at_once(case: str, run, at_once) -> None:
    kind, *layout = CASES[case]
    results, reference = run(kind, *layout), at_once[kind]
    assert_same_run(results, reference, relative=1e-5, weights=5e-5)
    held = sum(value.size for value, _, _ in results[0]["weights"].values())
    assert held == results[0]["planned_parameters"], "the plan counts otherwise than a rank holds"
    for found, expected in zip(results[0]["metrics"], reference[0]["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
        assert found["moe_dropped"] == 0 and 1 < found["moe_load"] < 4 and found["moe_balance_loss"] > 1
