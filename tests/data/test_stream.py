"""Streams: the samples are those of the definition, from any bookmark, for any number of workers and ranks."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import IGNORED_LABEL, SampleFormat
from data.blocks import BlockReader
from data.encoding import Encoder
from data.errors import DataError
from data.order import BLOCK_ORDER, BLOCK_SIZE, permutation, random_fraction, rank_share
from data.source import Cursor, Document, DocumentReader
from data.stream import StreamedSamples
from data.tokenizers.byte_level import ByteTokenizer

MARK = 256
SEED = 11


class ListSource:
    """Documents from a list; one of them may fail."""

    def __init__(self, contents: list[bytes], fails_at: int | None = None) -> None:
        self.contents, self.fails_at = contents, fails_at

    def read(self, cursor: Cursor | None = None) -> DocumentReader:
        place = dict(cursor or {"next": 0})

        def documents():
            while place["next"] < len(self.contents):
                number = place["next"]
                if number == self.fails_at:
                    raise DataError(f"document {number} cannot be read")
                place["next"] += 1
                yield Document(str(number), f"document {number}", self.contents[number])

        return DocumentReader(documents(), lambda: dict(place))

    def documents(self) -> DocumentReader:
        return self.read()

    def fingerprint(self) -> str:
        return "list"


def streamed(
    source: ListSource | list[bytes], length: int, shuffle: int, packing: str = "concatenate", background: bool = False
) -> StreamedSamples:
    source = source if isinstance(source, ListSource) else ListSource(source)
    tokenizer = ByteTokenizer()
    reader = BlockReader(
        source=source,
        is_held_out=lambda identity: False,
        encoder=Encoder(tokenizer, None, 0),
        boundary_id=MARK,
        seed=SEED,
        shuffle_documents=shuffle,
    )
    return StreamedSamples(reader, SampleFormat.of(tokenizer, length), packing, background)


def blocks_by_definition(contents: list[bytes], shuffle: int, epochs: int) -> list[list[bytes]]:
    """The documents of each block in the order in which the stream has them, spelled out."""
    blocks = []
    for epoch in range(epochs):
        first = 0
        number = 0
        while first < len(contents):
            size = shuffle
            if epoch and not number:
                size = 1 + int(random_fraction(SEED, BLOCK_SIZE, str(epoch)) * shuffle)
            block = contents[first : first + size]
            order = permutation(len(block), SEED, epoch, BLOCK_ORDER, number)
            blocks.append([block[document] for document in order])
            first, number = first + size, number + 1
    return blocks


def tokens_of(block: list[bytes]) -> list[int]:
    return [token for document in block for token in (MARK, *document)]


contents_of_a_stream = st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(contents_of_a_stream, st.integers(2, 12), st.integers(1, 15), st.booleans())
def test_concatenated_samples_are_those_of_the_definition(contents, length: int, shuffle: int, background) -> None:
    blocks = blocks_by_definition(contents, shuffle, epochs=4)
    expected = [token for block in blocks for token in tokens_of(block)]
    samples = streamed(contents, length, shuffle, background=background)
    count = (len(expected) - 1) // length
    rows = samples.rows(list(range(count)))
    samples.close()
    assert rows.tokens.tolist() == [expected[i * length : (i + 1) * length + 1] for i in range(count)]
    assert rows.valid.tolist() == [length] * count and rows.starts is None


@settings(max_examples=50, deadline=None)
@given(contents_of_a_stream, st.integers(2, 12), st.integers(1, 15))
def test_whole_documents_of_a_block_fill_samples(contents, length: int, shuffle: int) -> None:
    samples = streamed(contents, length, shuffle, packing="best_fit")
    index = 0
    for block in blocks_by_definition(contents, shuffle, epochs=3):
        # Sample by sample until the block's bytes are there; the next block begins a sample of its own.
        found: Counter[int] = Counter()
        while found.total() < sum(map(len, block)):
            batch = samples.batch([index])
            labels = batch.labels[batch.labels != IGNORED_LABEL]
            found.update(labels[labels != MARK].tolist())
            index += 1
        assert found == Counter(byte for document in block for byte in document)


@settings(max_examples=40, deadline=None)
@given(
    contents_of_a_stream,
    st.integers(2, 12),
    st.integers(1, 15),
    st.sampled_from(["concatenate", "best_fit"]),
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
)
def test_a_bookmark_leads_to_the_same_samples(contents, length: int, shuffle: int, packing: str, cuts) -> None:
    unbroken = streamed(contents, length, shuffle, packing)
    expected = [unbroken.sample(index)[0].tolist() for index in range(60)]
    bookmark: dict[str, Any] | None = None
    position, read = 0, []
    for cut in [*sorted(cuts), 60]:
        samples = streamed(contents, length, shuffle, packing)
        if bookmark is not None:
            samples.go_on(bookmark)
        read += [samples.sample(index)[0].tolist() for index in range(position, cut)]
        position = cut
        bookmark = json.loads(json.dumps(samples.bookmark(position)))
    assert read == expected


@settings(max_examples=30, deadline=None)
@given(
    contents_of_a_stream,
    st.integers(1, 15),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 3),
    st.integers(0, 4),
)
def test_any_world_size_and_any_resume_read_the_same(
    contents, shuffle: int, world: int, other_world: int, micro_batch_size: int, resumed_step: int
) -> None:
    batch_size = 24 * micro_batch_size
    steps = resumed_step + 2
    single = streamed(contents, 6, shuffle)
    expected = [single.sample(index)[0].tolist() for index in range(steps * batch_size)]
    read: list[list[int]] = []
    bookmark = None
    ranks: list[StreamedSamples] = []
    for step in range(steps):
        if step == 0 or step == resumed_step:
            ranks = [streamed(contents, 6, shuffle) for _ in range(world if step < resumed_step else other_world)]
            for samples in ranks:
                if bookmark is not None:
                    samples.go_on(bookmark)
        indices = range(step * batch_size, (step + 1) * batch_size)
        for rank, samples in enumerate(ranks):
            for share in rank_share(indices, micro_batch_size, rank, len(ranks)):
                read += samples.rows(share).tokens.tolist()
        # The main rank writes the checkpoint, and has read no further than its own share.
        bookmark = json.loads(json.dumps(ranks[0].bookmark((step + 1) * batch_size)))
    assert read == expected


def test_a_step_back_is_found_again_and_what_is_long_past_too() -> None:
    contents = [bytes([letter]) * 7 for letter in range(50)]
    samples = streamed(contents, 5, 4)
    forward = [samples.sample(index)[0].tolist() for index in range(150)]
    for index in (149, 148, 20, 0, 75, 74):
        assert samples.sample(index)[0].tolist() == forward[index]
    late = streamed(contents, 5, 4)
    late.go_on(samples.bookmark(75))
    assert late.sample(140)[0].tolist() == forward[140]
    assert late.sample(3)[0].tolist() == forward[3], "before the bookmark"
    with pytest.raises(IndexError, match="sample -1"):
        samples.batch([-1])


def test_places_that_are_forgotten_are_looked_for_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.stream._KNOWN_BLOCKS", 3)
    contents = [bytes([letter]) * 7 for letter in range(50)]
    samples = streamed(contents, 5, 2)
    forward = [samples.sample(index)[0].tolist() for index in range(150)]
    assert len(samples._begins) <= 6
    assert samples.sample(1)[0].tolist() == forward[1]
    # Older than all that is known: the oldest known place is no way to it.
    again = streamed(contents, 5, 2)
    bookmark = samples.bookmark(100)
    assert bookmark["begin"] <= 500
    again.go_on(bookmark)
    assert again.sample(100)[0].tolist() == forward[100]


def test_epochs_are_counted() -> None:
    samples = streamed([b"abcd"] * 20, 5, 3)  # a hundred tokens, twenty samples
    samples.rows(list(range(70)))
    assert [samples.epochs(position) for position in (0, 19, 20, 45, 60)] == [0, 0, 1, 2, 3]
    bookmark = samples.bookmark(45)
    later = streamed([b"abcd"] * 20, 5, 3)
    later.go_on(bookmark)
    assert later.epochs(45) == 2


@pytest.mark.parametrize("background", [False, True])
def test_a_failure_is_told_each_time_it_is_met(background: bool) -> None:
    samples = streamed(ListSource([b"abcd"] * 20, fails_at=13), 5, 4, background=background)
    samples.rows(list(range(11)))
    for _ in range(2):
        with pytest.raises(DataError, match="document 13 cannot be read"):
            samples.rows(list(range(11, 30)))
    samples.close()
    contents = [bytes([letter] * 4) for letter in range(20)]
    mended = streamed(contents, 5, 4)
    mended.go_on(samples.bookmark(11))
    assert mended.sample(11)[0].tolist() == streamed(contents, 5, 4).sample(11)[0].tolist()


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="no document to train on"):
        streamed([], 5, 4).sample(0)
    with pytest.raises(DataError, match="no document to train on"):
        streamed([b"", b""], 5, 4).sample(0)
    silent = streamed([b"abc"], 5, 4)
    encoder = silent.reader.encoder
    encoder.submit = lambda documents: lambda: [np.zeros(0, np.uint8) for _ in documents]
    with pytest.raises(DataError, match="the tokenizer makes no token"):
        silent.sample(0)


def test_first_tokens_are_those_of_one_pass() -> None:
    samples = streamed([b"abcd"] * 6, 5, 2)
    assert samples.first_tokens(12).tolist() == [MARK, *b"abcd", MARK, *b"abcd", MARK, *b"a"]
    assert len(samples.first_tokens(1000)) == 30
