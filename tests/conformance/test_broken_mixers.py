"""Every check fails for a mixer with a mistake that it is there to find."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from tests.conformance import checks, declarations, tensor_parallel
from tests.conformance.cases import Case, broken_case, find_case
from tests.conformance.mistakes import MISTAKES
from tests.workers import WorkerError

# These take a pool of workers too.
ON_TWO_RANKS = {"tensor_parallel", "sequence_parallel"}

CHECKS: dict[str, Callable[[Case], None]] = {
    name: function
    for module in (checks, declarations)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and inspect.signature(function).return_annotation == "None"
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str, worker_pools) -> None:
    case = broken_case(mistake)
    check = MISTAKES[mistake].check
    with pytest.raises(AssertionError) as noticed:
        if check in ON_TWO_RANKS:
            tensor_parallel.tensor_parallel(case, worker_pools, sequence=check == "sequence_parallel")
        else:
            CHECKS[check](case)
    # A program that fails on a rank would say nothing about what the ranks computed.
    assert not isinstance(noticed.value, WorkerError), noticed.value


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_passes_without_a_mistake_and_has_one_to_notice(check: str) -> None:
    if check == "positions_are_apart":
        pytest.raises(AssertionError, CHECKS[check], find_case("readme-0"))
        return
    assert check in {mistake.check for mistake in MISTAKES.values()}
    CHECKS[check](find_case("readme-0"))
