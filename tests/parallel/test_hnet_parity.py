"""H-Net takes the same steps however the batch is cut, over micro-batches and over ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.test_parity import LAYOUTS, assert_same_run

PROGRAMS = "tests.parallel.hnet_programs"
STEPS = 2

# (layout, train section); the reference is one process that has the whole batch at once.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "micro_batches_of_one": ("zero1", {"micro_batch_size": 1}),
    "micro_batches_recomputed": ("zero1", {"micro_batch_size": 4, "recompute": "block"}),
    "tensor2": ("tensor2", {"micro_batch_size": 8}),
    "tensor2_zero1": ("tensor2_zero1", {"micro_batch_size": 4}),
    "data2_zero0": ("data2_zero0", {"micro_batch_size": 2}),
    "data2_zero1_at_once": ("data2_zero1", {"micro_batch_size": 4}),
    "data2_zero1": ("data2_zero1", {"micro_batch_size": 2}),
    "data2_zero2": ("data2_zero2", {"micro_batch_size": 2}),
    "data2_zero3": ("data2_zero3", {"micro_batch_size": 2}),
    "data2_zero3_at_once": ("data2_zero3", {"micro_batch_size": 4}),
}


@pytest.fixture(scope="module")
def at_once(worker_pools):
    cache: dict[int, list[dict[str, Any]]] = {}

    def run(stages: int) -> list[dict[str, Any]]:
        if stages not in cache:
            overrides = {"train": {"micro_batch_size": 8}}
            cache[stages] = worker_pools(1).run(PROGRAMS, "hnet_steps", stages=stages, overrides=overrides, steps=STEPS)
        return cache[stages]

    return run


@pytest.mark.parametrize(
    ("stages", "case"),
    [(1, case) for case in CASES] + [(2, case) for case in ("micro_batches_of_one", "tensor2_zero1", "data2_zero1")],
)
def test_same_as_the_whole_batch_at_once(stages: int, case: str, worker_pools, at_once) -> None:
    layout, train = CASES[case]
    processes, parallel = LAYOUTS[layout]
    results = worker_pools(processes).run(
        PROGRAMS, "hnet_steps", stages=stages, overrides={"parallel": parallel, "train": train}, steps=STEPS
    )
    reference = at_once(stages)
    assert_same_run(results, reference, relative=1e-5, weights=5e-5)
    held = sum(value.size for value, _, _ in results[0]["weights"].values())
    assert held == results[0]["planned_parameters"], "the plan counts otherwise than a rank holds"
    for found, expected in zip(results[0]["metrics"], reference[0]["metrics"], strict=True):
        assert found.keys() == expected.keys() and "ratio_loss_0" in found
        for name, value in found.items():
            assert value == pytest.approx(expected[name], rel=1e-5), name


def test_batches_differ_from_their_parts(at_once) -> None:
    """Else a ratio loss of each micro-batch by itself would pass too."""
    for metrics in at_once(1)[0]["metrics"]:
        assert abs(metrics["boundary_fraction_0"] - 1 / 3) > 0.05
