"""What a mixer declares: costs, first weights, sizes that it refuses, names in the Hugging Face form."""

from __future__ import annotations

import pytest

from tests.conformance import declarations
from tests.conformance.cases import Case, channel_cases, sequence_cases

every = pytest.mark.parametrize("case", (*sequence_cases(), *channel_cases()), ids=str)


@every
def test_cost(case: Case) -> None:
    declarations.cost(case)


@every
def test_first_weights(case: Case) -> None:
    declarations.first_weights(case)


@every
def test_problem(case: Case) -> None:
    declarations.problem(case)


@every
def test_hugging_face_names(case: Case) -> None:
    declarations.hugging_face_names(case)
