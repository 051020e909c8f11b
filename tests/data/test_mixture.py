"""Mixtures: the source of every sample from its index alone, by weights, through changes of weights."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.mixture import MixtureOrder, Phase, phases_after_change

weights = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-4, 1e3), min_size=1)
seeds = st.integers(0, 1000)


@settings(deadline=None, max_examples=60)
@given(weights, seeds, st.integers(1, 9000))
def test_every_sample_of_every_source_comes_once_and_in_order(weights, seed, count) -> None:
    order = MixtureOrder([Phase(0, weights)], seed)
    read: Counter[str] = Counter()
    for index in range(count):
        source, within = order.locate(index)
        assert within == read[source]
        read[source] += 1
    assert order.consumed(count) == {name: read[name] for name in sorted(weights)}


@settings(deadline=None, max_examples=60)
@given(weights, seeds, st.integers(0, 10**10))
def test_shares_follow_the_weights_at_any_position(weights, seed, position) -> None:
    consumed = MixtureOrder([Phase(0, weights)], seed).consumed(position)
    total = sum(weights.values())
    assert sum(consumed.values()) == position
    for name, weight in weights.items():
        # Less than one sample for each source; a billionth for what float64 cannot tell apart.
        assert abs(consumed[name] - position * weight / total) <= len(weights) + position * 1e-9


@settings(deadline=None, max_examples=60)
@given(weights, seeds, st.integers(0, 10**9))
def test_a_position_is_found_without_what_came_before(weights, seed, start) -> None:
    through = MixtureOrder([Phase(0, weights)], seed)
    read = through.consumed(start)
    for index in range(start, start + 20):
        # An order that has looked at nothing else yet.
        source, within = MixtureOrder([Phase(0, weights)], seed).locate(index)
        assert (source, within) == through.locate(index)
        assert within == read[source]
        read[source] += 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 3000), weights), min_size=1, max_size=4), seeds)
def test_nothing_is_lost_or_repeated_where_weights_change(changes, seed) -> None:
    phases, first = [], 0
    for length, phase_weights in changes:
        phases.append(Phase(first, phase_weights))
        first += length
    order = MixtureOrder(phases, seed)
    read: Counter[str] = Counter()
    for index in range(first + 50):
        source, within = order.locate(index)
        assert source in [phase for phase in phases if phase.first <= index][-1].weights
        assert within == read[source]
        read[source] += 1
    assert {name: count for name, count in order.consumed(first + 50).items() if count} == dict(read)


@settings(deadline=None, max_examples=60)
@given(weights, weights, seeds, st.integers(0, 5000))
def test_new_weights_on_resume_go_on_where_each_source_stopped(before, after, seed, position) -> None:
    recorded = [Phase(0, before)]
    old = MixtureOrder(recorded, seed)
    new = MixtureOrder(phases_after_change(recorded, [Phase(0, after)], position), seed)
    read = Counter(old.consumed(position))
    for index in range(max(position - 20, 0), position):
        assert new.locate(index) == old.locate(index)
    for index in range(position, position + 100):
        source, within = new.locate(index)
        assert source in after and within == read[source]
        read[source] += 1


def test_phases_after_a_change() -> None:
    one, two, three = {"a": 1.0}, {"a": 1.0, "b": 2.0}, {"b": 1.0}
    configured = [Phase(0, one), Phase(100, two)]
    assert phases_after_change(configured, configured, 50) == configured
    assert phases_after_change(configured, configured, 100) == configured
    assert phases_after_change(configured, configured, 150) == configured
    assert phases_after_change(configured, [Phase(0, three)], 150) == [*configured, Phase(150, three)]
    assert phases_after_change(configured, [Phase(0, three)], 0) == [Phase(0, three)]
    moved = [Phase(0, one), Phase(200, two)]
    assert phases_after_change(configured, moved, 50) == moved
    assert phases_after_change(configured, moved, 150) == [*configured, Phase(150, one), Phase(200, two)]


def test_the_order_of_sources_in_a_file_and_the_scale_of_weights_change_nothing() -> None:
    one = MixtureOrder([Phase(0, {"a": 1.0, "b": 3.0})], 0)
    other = MixtureOrder([Phase(0, {"b": 0.75, "a": 0.25})], 0)
    assert [one.locate(index) for index in range(500)] == [other.locate(index) for index in range(500)]


def test_the_seed_moves_the_sources_against_each_other() -> None:
    orders = [MixtureOrder([Phase(0, {"a": 1.0, "b": 2.7, "c": 0.6})], seed) for seed in range(4)]
    assert len({tuple(order.locate(index)[0] for index in range(100)) for order in orders}) == 4


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "at least one source"),
        ([Phase(5, {"a": 1.0})], "from its first sample on"),
        ([Phase(0, {"a": 0.0})], "weight of a in data.mixture is 0.0"),
        ([Phase(0, {"a": float("nan")})], "weight of a"),
        ([Phase(0, {"a": 1.0}), Phase(0, {"a": 2.0})], "change twice at sample 0"),
    ],
)
def test_unfit_phases(phases: list[Phase], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MixtureOrder(phases, 0)


def test_a_negative_index() -> None:
    with pytest.raises(IndexError, match="sample -1"):
        MixtureOrder([Phase(0, {"a": 1.0})], 0).locate(-1)
