"""What a batch says of documents, and how it is cut into shorter rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.batch import IGNORED_LABEL, Rows, SampleFormat

MARK = 256
BYTE_LENGTHS = np.array([1] * 256 + [0])
FORMAT = SampleFormat(8, MARK, BYTE_LENGTHS)


def rows_of(tokens: list[list[int]], **further: object) -> Rows:
    array = np.array(tokens, dtype=np.int64)
    return Rows(array, np.full(len(array), array.shape[1] - 1), **further)


@given(st.lists(st.lists(st.sampled_from([1, 2, MARK]), min_size=9, max_size=9), min_size=1, max_size=4))
def test_segments_and_positions(tokens: list[list[int]]) -> None:
    batch = FORMAT.batch(rows_of(tokens))
    for row, line in enumerate(tokens):
        segment, position = 0, 0
        for place, token in enumerate(line[:-1]):
            if place and token == MARK:
                segment, position = segment + 1, 0
            assert (batch.segment_ids[row, place], batch.positions[row, place]) == (segment, position)
            position += 1


def test_shorter_rows_hold_the_same_tokens_and_predictions() -> None:
    batch = FORMAT.batch(rows_of([[MARK, 1, 2, 3, 4, MARK, 5, 6, 7], list(range(10, 19))]))
    short = batch.cut(4)
    assert short.tokens.tolist() == [[MARK, 1, 2, 3], [4, MARK, 5, 6], [10, 11, 12, 13], [14, 15, 16, 17]]
    assert short.labels.tolist() == [[1, 2, 3, 4], [MARK, 5, 6, 7], [11, 12, 13, 14], [15, 16, 17, 18]]
    assert short.document_starts.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, False, False],
        [True, False, False, False],
    ]
    assert (short.label_count, short.label_bytes) == (batch.label_count, batch.label_bytes)
    assert not batch.document_starts[0, 4], "the longer rows are as they were"
    assert batch.cut(8) is batch


@pytest.mark.parametrize("predicted", [True, False])
def test_the_ends_of_documents_are_predicted_or_not(predicted: bool) -> None:
    format = dataclasses.replace(FORMAT, predict_document_ends=predicted)
    batch = format.batch(rows_of([[MARK, 1, 2, MARK, 3, MARK, 4, 5, 6]]))
    ends = batch.labels[0] == (MARK if predicted else IGNORED_LABEL)
    assert ends.tolist() == [False, False, True, False, True, False, False, False]
    assert batch.label_count == (8 if predicted else 6) == int((batch.labels != IGNORED_LABEL).sum())
    assert batch.label_bytes == 6


def test_a_piece_without_a_mark_starts_anew_and_is_not_predicted() -> None:
    starts = np.zeros((1, 9), dtype=bool)
    starts[0, [0, 4]] = True
    batch = FORMAT.batch(rows_of([[MARK, 1, 2, 3, 7, 8, 9, 10, 11]], starts=starts))
    assert batch.document_starts[0].tolist() == [True, False, False, False, True, False, False, False]
    # Token 7 is the middle of another document: what comes after 3 is the end of its own.
    assert batch.labels[0].tolist() == [1, 2, 3, MARK, 8, 9, 10, 11]
    assert (batch.label_count, batch.label_bytes) == (8, 7)
    assert torch.equal(batch.positions[0], torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))


def test_words_start_where_stored_ids_say_so() -> None:
    format = dataclasses.replace(FORMAT, has_word_starts=True)
    flag = 257
    batch = format.batch(rows_of([[5, 1 + flag, 2, MARK, 3 + flag, 4, 5 + flag, 6, 7]]))
    assert batch.tokens.tolist() == [[5, 1, 2, MARK, 3, 4, 5, 6]]
    assert batch.labels.tolist() == [[1, 2, MARK, 3, 4, 5, 6, 7]]
    assert batch.document_starts[0].tolist() == [True, False, False, True, False, False, False, False]
    # The first byte of a row is the rest of a word that was cut: a word of its own here.
    assert batch.word_starts[0].tolist() == [True, True, False, True, True, False, True, False]
    assert batch.cut(2).word_starts.tolist() == [[True, True], [True, True], [True, False], [True, False]]
    assert batch.to("meta").word_starts.device.type == "meta"
    assert FORMAT.batch(rows_of([[MARK, 1, 2, 3, 4, 5, 6, 7, 8]])).word_starts is None
