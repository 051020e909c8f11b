"""HAT takes the same steps however the batch is cut, over micro-batches and over ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.test_parity import LAYOUTS, assert_same_run

PROGRAMS = "tests.parallel.hat_programs"
STEPS = 2

# (layout, train section); the reference is one process that has the whole batch at once.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "micro_batches_recomputed": ("zero1", {"micro_batch_size": 4, "recompute": "block"}),
    "tensor2_zero1": ("tensor2_zero1", {"micro_batch_size": 4}),
    "data2_zero1": ("data2_zero1", {"micro_batch_size": 2}),
    "data2_zero2": ("data2_zero2", {"micro_batch_size": 2}),
    "data2_zero3": ("data2_zero3", {"micro_batch_size": 2}),
}


@pytest.fixture(scope="module")
def at_once(worker_pools) -> list[dict[str, Any]]:
    overrides = {"train": {"micro_batch_size": 8}}
    return worker_pools(1).run(PROGRAMS, "hat_steps", overrides=overrides, steps=STEPS)


@pytest.mark.parametrize("case", CASES)
def test_same_as_the_whole_batch_at_once(case: str, worker_pools, at_once: list[dict[str, Any]]) -> None:
    layout, train = CASES[case]
    processes, parallel = LAYOUTS[layout]
    results = worker_pools(processes).run(
        PROGRAMS, "hat_steps", overrides={"parallel": parallel, "train": train}, steps=STEPS
    )
    assert_same_run(results, at_once, relative=1e-5, weights=5e-5)
    held = sum(value.size for value, _, _ in results[0]["weights"].values())
    assert held == results[0]["planned_parameters"], "the plan counts otherwise than a rank holds"
    for found, expected in zip(results[0]["metrics"], at_once[0]["metrics"], strict=True):
        assert found == expected and found["bytes_per_word"] > 1.5
