"""Whole documents in samples: nothing is lost, nothing is cut that fits, and the packing is best-fit-decreasing."""

from __future__ import annotations

import bisect
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import IGNORED_LABEL, SampleFormat
from data.best_fit import BestFitSamples, pack_lengths
from data.documents import TokenizedDocuments
from data.errors import DataError

MARK = 256


def samples_of(documents: TokenizedDocuments, length: int, seed: int = 0) -> BestFitSamples:
    return BestFitSamples(documents, SampleFormat(length, MARK, np.array([1] * 256 + [0])), seed)


@pytest.fixture(scope="module")
def make_samples(make_byte_samples):
    def make(contents: list[bytes], length: int, seed: int = 0) -> BestFitSamples:
        # Packed samples of two tokens accept any document; only their documents are wanted.
        return samples_of(make_byte_samples(contents, 2).documents, length, seed)

    return make


@given(st.lists(st.integers(1, 23), min_size=1, max_size=120), st.integers(23, 40))
def test_groups_are_the_bins_of_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    rooms: list[int] = []
    bins = 0
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms.pop(place)
        else:
            room, bins = capacity, bins + 1
        bisect.insort(rooms, room - length)
    groups = pack_lengths(np.bincount(lengths, minlength=capacity + 1), capacity)
    assert sum(group.samples for group in groups) == bins
    taken: dict[int, list[int]] = {}
    for group in groups:
        assert group.samples > 0
        assert sum(item.length * item.count for item in group.items) <= capacity
        for item in group.items:
            taken.setdefault(item.length, []).extend(range(item.first, item.first + item.count * group.samples))
    assert {length: len(pieces) for length, pieces in taken.items()} == dict(Counter(lengths))
    assert all(sorted(pieces) == list(range(len(pieces))) for pieces in taken.values())


def predictions(contents: list[bytes]) -> Counter[tuple[int, ...]]:
    """Every (document, place) -> next token, with the context from the document's beginning left out."""
    found: Counter[tuple[int, ...]] = Counter()
    for content in contents:
        tokens = (MARK, *content)
        found.update(zip(tokens[:-1], tokens[1:], strict=True))
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=15),
    st.integers(2, 16),
    st.integers(0, 2**32),
    st.integers(0, 2),
)
def test_an_epoch_predicts_each_token_once(make_samples, contents, length: int, seed: int, epoch: int) -> None:
    contents = [*contents, b"enough"]
    samples = make_samples(contents, length, seed)
    count = samples.samples_per_epoch
    batch = samples.batch(range(epoch * count, (epoch + 1) * count))
    scored = batch.labels != IGNORED_LABEL
    pairs = zip(batch.tokens[scored].tolist(), batch.labels[scored].tolist(), strict=True)
    found = Counter(pair for pair in pairs if pair[1] != MARK)
    assert found == predictions(contents)
    assert batch.label_bytes == sum(map(len, contents)), "each byte is predicted once"
    assert batch.label_count == int(scored.sum())
    assert samples.padding_tokens == count * (length + 1) - int(samples.packing.lengths.sum())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=12), st.integers(2, 40))
def test_documents_that_fit_are_whole(make_samples, contents: list[bytes], length: int) -> None:
    contents = [*contents, b"enough"]
    samples = make_samples(contents, length)
    whole = Counter(content for content in contents if len(content) <= length)
    for index in range(samples.samples_per_epoch):
        tokens, starts = samples.sample(index)
        batch = samples.batch([index])
        counted = int((batch.labels != IGNORED_LABEL).sum()) + 1
        for first, last in zip(np.flatnonzero(starts), [*np.flatnonzero(starts)[1:], len(tokens)], strict=True):
            if first < counted and tokens[first] == MARK:
                piece = bytes(tokens[first + 1 : last].tolist())
                whole -= Counter([piece])
    assert not whole, "a document that fits was cut"


def test_a_long_document_is_cut_and_each_piece_starts_anew(make_samples) -> None:
    samples = make_samples([bytes(range(10)), b"xy"], 4)
    rows = sorted(samples.sample(index)[0].tolist() for index in range(samples.samples_per_epoch))
    # Eleven tokens make pieces of five that share one: 0-4, 4-8, 8-10; the last shares a sample with nothing else.
    assert rows == [[3, 4, 5, 6, 7], [7, 8, 9, MARK, MARK], [MARK, 0, 1, 2, 3], [MARK, 120, 121, MARK, MARK]]
    batch = samples.batch(range(samples.samples_per_epoch))
    (last,) = (row for row in range(4) if batch.tokens[row, 0] == 7)
    assert batch.labels[last].tolist() == [8, 9, MARK, IGNORED_LABEL]


def test_the_order_is_a_function_of_seed_and_index(make_samples, make_random_contents) -> None:
    contents = make_random_contents(np.random.default_rng(0), 40, 30)
    samples = make_samples(contents, 32, seed=3)
    total = 3 * samples.samples_per_epoch
    forward = [samples.sample(index)[0].tolist() for index in range(total)]
    again = make_samples(contents, 32, seed=3)
    for index in np.random.default_rng(1).permutation(total):
        assert again.sample(int(index))[0].tolist() == forward[index]
    count = samples.samples_per_epoch
    assert sorted(forward[:count]) != sorted(forward[count : 2 * count]), "other documents meet in the next epoch"
    assert make_samples(contents, 32, seed=4).sample(0)[0].tolist() != forward[0]


def test_little_is_padded_where_lengths_vary(make_samples, make_random_contents) -> None:
    contents = make_random_contents(np.random.default_rng(0), 400, 60)
    samples = make_samples(contents, 127)
    assert samples.padding_tokens < 0.01 * samples.samples_per_epoch * 128


def test_no_document(make_samples) -> None:
    samples = make_samples([b"abc"], 4)
    empty = samples.documents
    nothing = TokenizedDocuments(empty.tokens[:0], empty.offsets[:1], empty.counts)
    with pytest.raises(DataError, match="no document; give more text"):
        samples_of(nothing, 4)
    with pytest.raises(IndexError, match="sample -1"):
        samples.batch([-1])
