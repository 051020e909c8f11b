"""``bench data`` at tiny sizes: rows, ratios, equal shapes, missing peers; never how fast anything is."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from pretrain.bench import data, readers
from pretrain.bench.contestants import PeerMissing
from pretrain.bench.readers import Reading

TINY = Reading(batch_size=2, sequence_length=64, batches=3)


@pytest.fixture(scope="module")
def corpus():
    with readers.make_corpus(200_000, TINY, rows=50) as made:
        yield made
    assert not made.directory.exists()


def missing_package(corpus, reading):
    raise PeerMissing("not installed (no such package)")


def test_every_row_is_measured_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.PEERS, "litdata", (missing_package, 1))
    lines: list[str] = []
    result = data.bench_data(200_000, TINY, text_bytes=200_000, rounds=2, say=lines.append)
    by_name = {row.name: row for row in result.rows}
    assert by_name["litdata"].missing == "not installed (no such package)"
    assert result.rows[0].name == "ours" and result.rows[-1].name == "bare memory map"
    for row in result.rows + result.encoding:
        if row.missing is None:
            assert len(row.seconds) == 2
            assert all(math.isfinite(rate) and rate > 0 for rate in row.tokens_per_second())
    assert result.ratios(result.rows[0]) == [1.0, 1.0]
    megatron = by_name["Megatron GPTDataset"]
    assert result.ratios(megatron)[1] == pytest.approx(megatron.seconds[1] / result.rows[0].seconds[1])
    assert 0 < result.later_start and 0 < result.first_start
    console = Console(file=io.StringIO(), width=200)
    for drawn in data.tables(result):
        console.print(drawn)
    text = console.file.getvalue()
    assert all(row.name in text for row in result.rows + result.encoding)
    assert json.loads(json.dumps(result.to_dict()))["tokens"] == result.corpus.tokens
    assert len(lines) == 2 * (2 + 1) + 2


def test_readers_give_the_same_shapes(corpus) -> None:
    """And ours knows the documents, which the masks by document confirm."""
    batch = readers.open_ours(corpus, TINY).train.batch(range(2))
    assert batch.tokens.shape == batch.labels.shape == batch.segment_ids.shape == (2, 64)
    assert batch.label_count == 2 * 64
    for make in (readers.ours, readers.bare_memory_map, readers.hugging_face, readers.megatron):
        further = {readers.ours: ("concatenate",), readers.megatron: (False,)}.get(make, ())
        make(corpus, TINY, *further).run()


def test_the_corpus_is_what_megatron_and_we_read(corpus) -> None:
    ours = readers.open_ours(corpus, TINY)
    counts = ours.summary.train.counts, ours.summary.held_out.counts
    assert sum(count.documents for count in counts) == corpus.documents
    assert sum(count.tokens for count in counts) == corpus.tokens
    rows = ours.train.batch(range(100)).tokens
    assert 0 <= int(rows.min()) and int(rows.max()) == readers.MARK
    assert len(torch.unique(rows)) > 200, "the tokens are not random"
