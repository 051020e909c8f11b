"""The check that two tensor-parallel ranks compute what one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.conformance import programs
from tests.conformance.cases import Case
from tests.conformance.tools import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE
from tests.workers import WorkerPool

PROGRAMS = "tests.conformance.programs"


def _assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= tolerance * scale, f"{what}: differs by {error:.2g} where the largest value is {scale:.2g}"


def assemble(slices: list[np.ndarray], dimension: int | None, what: str) -> np.ndarray:
    """The whole of what ranks hold slices of; what is replicated must be equal on all of them."""
    if dimension is not None:
        # A state has the batch before the dimensions that it declares; its caller counts that in.
        return np.concatenate(slices, axis=dimension)
    for other in slices[1:]:
        _assert_close(other, slices[0], OUTPUT_TOLERANCE, f"{what} on two ranks")
    return slices[0]


def tensor_parallel(case: Case, pool: Callable[[int], WorkerPool], sequence: bool) -> None:
    """Outputs, final state, and gradients of inputs and parameters of two ranks together are those of one."""
    results: list[dict[str, Any]] = pool(2).run(PROGRAMS, "run_mixer", name=case.name, tensor=2, sequence=sequence)
    one = programs.run_mixer(case.name, tensor=1, sequence=False)
    for key in ("output", "hidden"):
        tolerance = OUTPUT_TOLERANCE if key == "output" else GRADIENT_TOLERANCE
        for index, expected in enumerate(one[key]):
            parts = [result[key][index] for result in results]
            whole = assemble(parts, 0 if sequence else None, f"call {index}, {key}")
            _assert_close(whole, expected, tolerance, f"call {index}, {key}")
    splits = results[0]["splits"]
    for name, expected in one["state"].items():
        dimension = None if splits[name] is None else splits[name] + 1
        whole = assemble([result["state"][name] for result in results], dimension, f"state {name}")
        _assert_close(whole, expected, OUTPUT_TOLERANCE, f"state {name}")
    for name, expected in one["gradients"].items():
        parts = [result["gradients"][name] for result in results]
        summed = name in results[0]["summed"]
        whole = sum(parts) if summed else assemble(parts, splits[name], f"gradient of {name}")
        _assert_close(whole, expected, GRADIENT_TOLERANCE, f"gradient of {name}")


def first_weights(case: Case, pool: Callable[[int], WorkerPool]) -> None:
    """Two ranks together start from exactly the weights that one starts from."""
    results = pool(2).run(PROGRAMS, "first_weights", name=case.name, tensor=2, seed=3)
    one, _ = programs.first_weights(case.name, tensor=1, seed=3)
    splits = results[0][1]
    assert results[0][0].keys() == one.keys()
    for name, expected in one.items():
        whole = assemble([weights[name] for weights, _ in results], splits[name], name)
        np.testing.assert_array_equal(whole, expected, err_msg=name)
