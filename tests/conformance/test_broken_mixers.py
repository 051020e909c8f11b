"""Every check fails for a mixer with a mistake that it is there to find."""

from __future__ import annotations

import inspect

import pytest

from tests.conformance import checks, tensor_parallel
from tests.conformance.cases import broken_case, find_case
from tests.conformance.mistakes import MISTAKES
from tests.workers import WorkerError


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str, worker_pools) -> None:
    case = broken_case(mistake)
    check = MISTAKES[mistake].check
    with pytest.raises(AssertionError) as noticed:
        if check == "tensor_parallel":
            tensor_parallel.tensor_parallel(case, worker_pools, sequence=False)
        else:
            getattr(checks, check)(case)
    # A program that fails on a rank would say nothing about what the ranks computed.
    assert not isinstance(noticed.value, WorkerError), noticed.value


def test_the_mixer_without_a_mistake_passes_the_same_checks() -> None:
    case = find_case("readme-0")
    for check in {mistake.check for mistake in MISTAKES.values()} - {"tensor_parallel"}:
        getattr(checks, check)(case)


def test_every_check_of_a_sequence_mixer_has_a_mistake() -> None:
    found = {
        name
        for name, function in inspect.getmembers(checks, inspect.isfunction)
        if list(inspect.signature(function).parameters) == ["case"] and not name.startswith(("random", "build"))
    }
    assert found - {"positions_are_apart"} == {mistake.check for mistake in MISTAKES.values()} - {"tensor_parallel"}
