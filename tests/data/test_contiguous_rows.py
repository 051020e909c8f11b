"""Rows that go on from batch to batch: each reads a part of the epoch's concatenation, no label lost at a seam."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import Batch
from data.config import DataConfig
from data.dataset import open_data
from data.errors import DataError
from data.order import DOCUMENT_ORDER, permutation, rank_share
from data.packing import PackedSamples
from tests.data.conftest import byte_samples, random_contents

MARK = 256


def samples_of(seed: int, rows: int, length: int) -> tuple[PackedSamples, list[bytes]]:
    """Random documents that fill two samples or more of each row."""
    random = np.random.default_rng(seed)
    contents = random_contents(random, int(random.integers(4, 20)), 30)
    contents.append(random.integers(0, 256, 2 * rows * length, dtype=np.uint8).tobytes())
    plain = byte_samples(contents, length, seed)
    return PackedSamples(plain.documents, plain.format, seed, shuffled=True, contiguous_rows=rows), contents


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(2, 9), st.integers(0, 2))
def test_each_row_reads_its_part_of_the_epoch(seed: int, rows: int, length: int, epoch: int) -> None:
    samples, contents = samples_of(seed, rows, length)
    order = permutation(len(contents), seed, epoch, DOCUMENT_ORDER)
    stream = np.concatenate([[MARK, *contents[document]] for document in order])
    steps = samples.samples_per_epoch // rows
    assert steps >= 2 and samples.samples_per_epoch == steps * rows
    assert steps * rows * length + samples.dropped_tokens == len(stream) - 1
    assert samples.dropped_tokens < rows * length
    first = epoch * samples.samples_per_epoch
    batches = [samples.batch(range(first + step * rows, first + (step + 1) * rows)) for step in range(steps)]
    for row in range(rows):
        part = stream[row * steps * length : (row + 1) * steps * length + 1]
        read = {
            name: torch.cat([getattr(batch, name)[row] for batch in batches]).numpy()
            for name in ("tokens", "labels", "document_starts")
        }
        np.testing.assert_array_equal(read["tokens"], part[:-1])
        # Every token but the part's first is predicted once, those behind a seam too.
        np.testing.assert_array_equal(read["labels"], part[1:])
        starts = part[:-1] == MARK
        starts[0] = True
        np.testing.assert_array_equal(read["document_starts"], starts)
    assert all(batch.label_count == rows * length for batch in batches)


def stacked(batches: list[Batch]) -> list[torch.Tensor]:
    return [torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "labels", "document_starts")]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(1, 4), (2, 2), (4, 1)]), st.integers(0, 12))
def test_a_batch_depends_on_its_place_alone(seed: int, layout: tuple[int, int], step: int) -> None:
    samples, _ = samples_of(seed, rows=4, length=5)
    whole = stacked([samples.batch(range(4 * step, 4 * step + 4))])
    ranks, micro_batch_size = layout
    parts = []
    for rank in range(ranks):
        again, _ = samples_of(seed, rows=4, length=5)
        indices = range(4 * step, 4 * step + 4)
        parts += [again.batch(share) for share in rank_share(indices, micro_batch_size, rank, ranks)]
    for found, expected in zip(stacked(parts), whole, strict=True):
        assert torch.equal(found, expected)


def test_too_few_samples_are_refused() -> None:
    plain = byte_samples([bytes(range(40))], 4)
    with pytest.raises(DataError, match="10 samples of data.sequence_length 4, too few for train.carry_state.*6 rows"):
        PackedSamples(plain.documents, plain.format, 0, shuffled=True, contiguous_rows=6)


def section(directory, **settings) -> DataConfig:
    source = {"type": "text_files", "path": str(directory), "pattern": "**/*.txt"}
    raw = {"source": source, "tokenizer": {"type": "bytes"}, "sequence_length": 16} | settings
    return DataConfig.model_validate(raw)


def test_opened_data_go_on_and_have_an_order_of_their_own(text_directory) -> None:
    opened = {rows: open_data(section(text_directory), 1, rows) for rows in (None, 3, 4)}
    assert len({data.fingerprint for data in opened.values()}) == 3
    first, second = (opened[3].train.batch(range(3 * step, 3 * step + 3)) for step in range(2))
    assert torch.equal(first.labels[:, -1], second.tokens[:, 0])
    # Held-out samples are read alone.
    assert opened[3].held_out.batch(range(4)).document_starts[:, 0].all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": "best_fit"}, "data.packing=best_fit .* set data.packing to concatenate"),
        ({"stream": {"workers": 0}}, "leave out data.stream, or prepare"),
        (
            {"curriculum": [{"from_tokens": 0, "sequence_length": 8}]},
            "data.curriculum .* leave out its sequence_length",
        ),
    ],
)
def test_data_that_cannot_go_on_are_refused(settings, message, text_directory) -> None:
    with pytest.raises(DataError, match=message):
        open_data(section(text_directory, **settings), 1, contiguous_rows=2)


def test_a_mixture_is_refused(text_directory) -> None:
    source = {"type": "text_files", "path": str(text_directory), "pattern": "**/*.txt"}
    mixed = section(text_directory, source=None, mixture={"only": {"source": source, "weight": 1.0}})
    with pytest.raises(DataError, match="data.mixture .* give data.source"):
        open_data(mixed, 1, contiguous_rows=2)
