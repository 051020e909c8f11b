"""A rank that holds the others up is named."""

from __future__ import annotations

import pytest

from pretrain.observe.slow_ranks import compared


@pytest.mark.parametrize(
    ("seconds", "named"),
    [
        ([1.0, 1.1, 0.9, 1.2], []),
        ([1.0, 1.1, 1.9, 1.2], [2]),
        ([1.0, 3.0], [1]),
        # Many times as long, and nothing worth a word.
        ([0.0001, 0.0001, 0.004], []),
        ([0.5, 4.0, 0.5, 4.0], [1, 3]),
    ],
)
def test_who_takes_far_longer_than_the_median_is_named(seconds: list[float], named: list[int]) -> None:
    said = compared("reading data", seconds, "rank")
    assert [int(sentence.split()[1]) for sentence in said] == named
    for sentence in said:
        assert sentence.endswith("the others wait for it")


def test_ranks_compare_themselves(worker_pools) -> None:
    for layout, waits, said in (
        ({"zero": 1}, "forward and backward", ["data-parallel rank 1 takes 0.1"]),
        ({"zero": 1}, "reading data", ["rank 1 takes 0.1"]),
        # Replicas wait for each other within the pass, whose time then says nothing.
        ({"zero": 2}, "forward and backward", []),
        ({"tensor": 2, "zero": 1}, "forward and backward", []),
    ):
        results = worker_pools(2).run("tests.observe.programs", "slow_rank", parallel=layout, waits=waits)
        assert results[0] == results[1] and len(results[0]) == len(said), results
        for sentence, start in zip(results[0], said, strict=True):
            assert sentence.startswith(start)
