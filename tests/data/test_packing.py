"""The order of samples is pure, nothing is lost or repeated, starts and labels are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import IGNORED_LABEL
from data.errors import DataError
from data.order import permutation, rank_share
from data.packing import PackedSamples

MARK = 256


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[bytes], int]:
    """Documents of 1 to 40 bytes and a sequence length that they fill at least once."""
    contents = draw(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=12))
    tokens = sum(map(len, contents)) + len(contents)
    sequence_length = draw(st.integers(2, 16).filter(lambda length: length < tokens or tokens <= 3))
    return contents if sequence_length < tokens else [*contents, b"filler" * 3], sequence_length


def concatenation(contents: list[bytes], order: np.ndarray) -> list[int]:
    """What an epoch reads, spelled out: each document's mark and bytes, in order."""
    return [token for document in order for token in (MARK, *contents[document])]


def document_order(samples: PackedSamples, epoch: int) -> np.ndarray:
    return permutation(len(samples.documents.lengths), samples.seed, epoch, purpose=0)


@settings(max_examples=60, deadline=None)
@given(corpora(), st.integers(0, 2**32), st.integers(0, 3))
def test_an_epoch_reads_each_position_once(make_byte_samples, corpus, seed: int, epoch: int) -> None:
    contents, length = corpus
    samples = make_byte_samples(contents, length, seed)
    stream = concatenation(contents, document_order(samples, epoch))
    count = samples.samples_per_epoch
    assert count * length + samples.dropped_tokens == len(stream) - 1
    expected = sorted(tuple(stream[k * length : (k + 1) * length + 1]) for k in range(count))
    actual = sorted(tuple(samples.sample(i)[0].tolist()) for i in range(epoch * count, (epoch + 1) * count))
    assert actual == expected


@settings(max_examples=60, deadline=None)
@given(
    corpora(),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_the_order_is_the_same_for_any_world_size_and_from_any_step(
    make_byte_samples, corpus, world: int, other_world: int, micro_batch_size: int, resumed_step: int
) -> None:
    contents, length = corpus
    single = make_byte_samples(contents, length, seed=7)
    global_batch_size = math.lcm(world, other_world) * micro_batch_size
    steps = resumed_step + 3
    expected = [single.sample(i)[0].tolist() for i in range(steps * global_batch_size)]
    read = []
    for step in range(steps):
        # From resumed_step on, another number of ranks and fresh objects, as in a restarted run.
        ranks = world if step < resumed_step else other_world
        for rank in range(ranks):
            samples = make_byte_samples(contents, length, seed=7)
            indices = range(step * global_batch_size, (step + 1) * global_batch_size)
            share = rank_share(indices, micro_batch_size, rank, ranks)
            for indices in share:
                batch = samples.batch(indices)
                assert batch.tokens.shape == (micro_batch_size, length)
                read += torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1).tolist()
    assert read == expected


@settings(max_examples=60, deadline=None)
@given(corpora(), st.integers(0, 50))
def test_starts_and_labels(make_byte_samples, corpus, first: int) -> None:
    contents, length = corpus
    samples = make_byte_samples(contents, length, seed=3)
    indices = range(first, first + 4)
    batch = samples.batch(indices)
    label_bytes = 0
    for row, index in enumerate(indices):
        tokens, starts = samples.sample(index)
        assert tokens.dtype == np.int64 and starts.dtype == np.bool_
        assert starts.tolist() == [position == 0 or t == MARK for position, t in enumerate(tokens)]
        assert batch.tokens[row].tolist() == tokens[:-1].tolist()
        assert batch.labels[row].tolist() == tokens[1:].tolist()
        assert batch.document_starts[row].tolist() == starts[:-1].tolist()
        label_bytes += sum(token != MARK for token in tokens[1:])
    assert (batch.label_count, batch.label_bytes) == (4 * length, label_bytes)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.document_starts.dtype == torch.bool


@settings(max_examples=60, deadline=None)
@given(corpora())
def test_held_out_is_read_once_in_order_and_padded(make_byte_samples, corpus) -> None:
    contents, length = corpus
    samples = make_byte_samples(contents, length, shuffled=False)
    stream = concatenation(contents, np.arange(len(contents)))
    batch = samples.batch(range(samples.samples_per_epoch))
    labels = batch.labels.flatten().tolist()
    padding = len(labels) - (len(stream) - 1)
    assert 0 <= padding < length
    assert labels == stream[1:] + [IGNORED_LABEL] * padding
    tokens = batch.tokens.flatten().tolist()
    assert tokens[: len(stream) - 1] == stream[:-1]
    assert batch.label_count == len(stream) - 1
    assert batch.label_bytes == sum(map(len, contents))


def test_rows_behind_the_held_out_split_are_padding(make_byte_samples) -> None:
    samples = make_byte_samples([b"abc"], 4, shuffled=False)
    batch = samples.batch([0, 1, 99])
    assert batch.labels.tolist() == [[97, 98, 99, IGNORED_LABEL]] + 2 * [[IGNORED_LABEL] * 4]
    assert batch.tokens.tolist() == [[MARK, 97, 98, 99]] + 2 * [[MARK] * 4]
    assert (batch.label_count, batch.label_bytes) == (3, 3)


def test_each_epoch_and_seed_has_its_own_order(make_byte_samples, make_random_contents) -> None:
    contents = make_random_contents(np.random.default_rng(0), 30, 50)
    samples = make_byte_samples(contents, 8, seed=1)
    count = samples.samples_per_epoch
    epochs = [[samples.sample(e * count + k)[0].tolist() for k in range(count)] for e in range(3)]
    other_seed = make_byte_samples(contents, 8, seed=2)
    epochs.append([other_seed.sample(k)[0].tolist() for k in range(count)])
    for first in range(4):
        for second in range(first):
            assert epochs[first] != epochs[second]
            assert sorted(epochs[first]) != sorted(epochs[second]), "documents keep their order"


def test_each_epoch_shuffles_its_samples_anew(make_byte_samples) -> None:
    # One document, so that only the order of samples can differ.
    samples = make_byte_samples([bytes(range(200))], 4, seed=0)
    count = samples.samples_per_epoch
    first, second = ([samples.sample(e * count + k)[0].tolist() for k in range(count)] for e in range(2))
    assert first != second and sorted(first) == sorted(second)


def test_samples_are_shuffled_beyond_the_order_of_documents(make_byte_samples) -> None:
    samples = make_byte_samples([bytes(range(200))], 4, seed=0)
    firsts = [int(samples.sample(i)[0][1]) for i in range(samples.samples_per_epoch)]
    assert sorted(firsts) == list(range(0, 200, 4))
    assert firsts != sorted(firsts)


def test_samples_may_be_asked_for_in_any_order(make_byte_samples, make_random_contents) -> None:
    contents = make_random_contents(np.random.default_rng(1), 20, 30)
    samples = make_byte_samples(contents, 5, seed=4)
    total = 6 * samples.samples_per_epoch
    forward = [samples.sample(i)[0].tolist() for i in range(total)]
    for index in np.random.default_rng(2).permutation(total):
        assert samples.sample(int(index))[0].tolist() == forward[index]


def test_the_order_never_changes_between_versions() -> None:
    """A run that resumes after an upgrade must find its order: these values are the promise."""
    assert permutation(8, seed=0, epoch=0, purpose=0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(8, seed=0, epoch=0, purpose=1).tolist() == [4, 7, 6, 1, 2, 0, 5, 3]
    assert permutation(8, seed=1234, epoch=5, purpose=0).tolist() == [3, 6, 5, 7, 2, 4, 1, 0]


@given(st.integers(1, 200), st.integers(0, 2**63), st.integers(0, 1000))
def test_permutations_hold_every_number_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(size, seed, epoch, purpose=0).tolist()) == list(range(size))


def test_rank_share_refuses_what_does_not_divide() -> None:
    with pytest.raises(DataError, match="global batch of 10 .* micro-batches of 2 on 4 .* multiple of 8"):
        rank_share(range(10), 2, 0, 4)
    with pytest.raises(DataError, match="rank 4 is not one of 4"):
        rank_share(range(8), 2, 4, 4)
    with pytest.raises(DataError, match="micro-batches of 0"):
        rank_share(range(8), 0, 0, 1)


def test_too_little_text_for_a_sample(make_byte_samples) -> None:
    assert make_byte_samples([b"abcd"], 4).samples_per_epoch == 1
    with pytest.raises(DataError, match="training split has 5 tokens.*sequence_length 5.*lower"):
        make_byte_samples([b"abcd"], 5)


def test_negative_samples_do_not_exist(make_byte_samples) -> None:
    with pytest.raises(IndexError, match="sample -1"):
        make_byte_samples([b"abcd"], 4).batch([0, -1])


def test_a_batch_moves_to_a_device(make_byte_samples) -> None:
    batch = make_byte_samples([b"abcd"], 4).batch([0])
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.tokens, moved.labels, moved.document_starts)} == {"meta"}
    assert (moved.label_bytes, moved.label_count) == (batch.label_bytes, batch.label_count)
