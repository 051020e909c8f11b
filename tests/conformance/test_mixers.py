"""What a mixer computes: every registered mixer and every example of it, in one process."""

from __future__ import annotations

import pytest

from tests.conformance import checks
from tests.conformance.cases import Case, channel_cases, sequence_cases

sequence = pytest.mark.parametrize("case", sequence_cases(), ids=str)
channel = pytest.mark.parametrize("case", channel_cases(), ids=str)
every = pytest.mark.parametrize("case", (*sequence_cases(), *channel_cases()), ids=str)


@sequence
def test_cutting(case: Case) -> None:
    checks.cutting(case)


@sequence
def test_causality(case: Case) -> None:
    checks.causality(case)


@sequence
def test_documents(case: Case) -> None:
    checks.documents(case)


@sequence
def test_state(case: Case) -> None:
    checks.state(case)


@channel
def test_positions_are_apart(case: Case) -> None:
    checks.positions_are_apart(case)


@every
def test_bfloat16(case: Case) -> None:
    checks.bfloat16(case)


@every
def test_slopes(case: Case) -> None:
    checks.slopes(case)
