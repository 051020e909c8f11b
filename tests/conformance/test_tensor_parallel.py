"""Two tensor-parallel ranks compute what one does, for every registered mixer."""

from __future__ import annotations

import pytest

from tests.conformance import tensor_parallel
from tests.conformance.cases import Case, channel_cases, sequence_cases

every = pytest.mark.parametrize("case", (*sequence_cases(), *channel_cases()), ids=str)


@every
@pytest.mark.parametrize("sequence", [False, True], ids=["whole_sequence", "sequence_parallel"])
def test_tensor_parallel(case: Case, sequence: bool, worker_pools) -> None:
    tensor_parallel.tensor_parallel(case, worker_pools, sequence)


@every
def test_first_weights_of_two_ranks(case: Case, worker_pools) -> None:
    tensor_parallel.first_weights(case, worker_pools)
