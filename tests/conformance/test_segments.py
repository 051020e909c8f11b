"""Context parallelism of every registered mixer that exchanges what is before its segments."""

from __future__ import annotations

import pytest

from tests.conformance.cases import Case, sequence_cases
from tests.conformance.segments import figures_of_segments, segments

CASES = [case for case in sequence_cases() if case.config.exchanges_segments]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("size", "scheme", "has_documents"), [(2, "gather", False), (3, "gather", True), (4, "scan", True)]
)
def test_segments(case: Case, size: int, scheme: str, has_documents: bool) -> None:
    segments(case, size, scheme, has_documents)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_figures_of_segments(case: Case) -> None:
    figures_of_segments(case, 3, "gather")
