"""Streams from a configuration: every kind of source, workers, mixtures, what is held out, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pydantic
import pytest

from data.baseline import bigram_bits_per_byte
from data.config import DataConfig
from data.dataset import Data, open_data
from data.errors import DataError
from data.mixture import Phase
from data.source import Document
from data.splitting import held_out

MARK = 256
SEED = 11


@pytest.fixture(autouse=True)
def datasets_keeps_its_copies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same 90 texts behind every kind of source, with bad records where a source may skip them."""
    root = tmp_path_factory.mktemp("sources")
    rows = [{"text": f"text {number} " * (1 + number % 5)} for number in range(90)]
    (root / "files").mkdir()
    (root / "parquet").mkdir()
    for part in range(3):
        own = rows[part * 30 : (part + 1) * 30]
        (root / "files" / f"{part}.txt").write_text("<end>".join(row["text"] for row in own))
        lines = [json.dumps(row) for row in own]
        lines.insert(7, "{broken")
        text = "\n".join(lines) + "\n"
        (root / f"{part}.jsonl").write_text(text)
        with gzip.open(root / f"{part}.jsonl.gz", "wt") as zipped:
            zipped.write(text)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(own), root / "parquet" / f"{part}.parquet")
    skipping = {"bad_records": "skip", "maximum_bad_records": 3}
    hub = {"type": "huggingface", "path": "parquet", "data_files": f"{root}/parquet/*.parquet"}
    return {
        "text_files": {"type": "text_files", "path": str(root / "files"), "document_separator": "<end>"},
        "jsonl": {"type": "jsonl", "path": f"{root}/*.jsonl", **skipping},
        "jsonl_gz": {"type": "jsonl", "path": f"{root}/*.jsonl.gz", **skipping},
        "hub_streaming": hub,
        "hub_local_copy": hub | {"streaming": False},
    }


KINDS = ["text_files", "jsonl", "jsonl_gz", "hub_streaming", "hub_local_copy"]


def stream_config(source: dict[str, Any], stream: dict[str, Any] | None = None, **settings: Any) -> DataConfig:
    raw = {"source": source, "tokenizer": {"type": "bytes"}, "sequence_length": 16, "held_out_fraction": 0.2}
    stream = {"shuffle_documents": 7, "workers": 0} if stream is None else stream
    return DataConfig.model_validate(raw | {"stream": stream} | settings)


def tokens(data: Data, indices: range) -> list[list[int]]:
    return data.train.batch(indices).tokens.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_goes_on_from_a_bookmark(sources, kind: str) -> None:
    config = stream_config(sources[kind])
    unbroken = open_data(config, SEED)
    expected = tokens(unbroken, range(260))
    for cut in (0, 1, 33, 34, 35, 120, 201):
        first = open_data(config, SEED)
        assert tokens(first, range(cut)) == expected[:cut]
        bookmarks = json.loads(json.dumps(first.bookmarks(cut)))
        second = open_data(config, SEED)
        second.go_on(bookmarks)
        assert tokens(second, range(cut, 260)) == expected[cut:], cut
        assert second.fingerprint == unbroken.fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "hub_streaming"])
def test_no_held_out_document_is_trained_on_and_every_other_is(sources, kind: str) -> None:
    data = open_data(stream_config(sources[kind], sequence_length=4), SEED)
    prepared = open_data(stream_config(sources[kind], sequence_length=4).model_copy(update={"stream": None}), SEED)
    counts = prepared.summary.train.counts
    one_epoch = counts.tokens // 4
    stream = [token for row in tokens(data, range(one_epoch)) for token in row]
    found = Counter(bytes(part) for part in _split(stream))
    expected = Counter(bytes(part) for part in _split(prepared.train.first_tokens(10**6).tolist()))
    missing = expected - found
    assert sum(missing.values()) <= 1 and sum((found - expected).values()) <= 1, "but for the one that was cut"
    assert data.held_out.first_tokens(10**6).tolist() == prepared.held_out.first_tokens(10**6).tolist()
    assert bigram_bits_per_byte(data.train, data.held_out) == bigram_bits_per_byte(prepared.train, prepared.held_out)


def _split(stream: list[int]) -> list[list[int]]:
    documents: list[list[int]] = []
    for token in stream:
        if token == MARK:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


def test_only_so_many_held_out_documents_are_kept(sources) -> None:
    stream = {"shuffle_documents": 7, "workers": 0, "held_out_samples": 3}
    data = open_data(stream_config(sources["jsonl"], stream), SEED)
    assert data.held_out.samples_per_epoch in (3, 4, 5, 6)
    whole = open_data(stream_config(sources["jsonl"]), SEED)
    assert whole.held_out.samples_per_epoch > 6
    assert tokens_equal(data, whole, 3)
    with pytest.raises(DataError, match="no document of data.source falls into the held-out split"):
        open_data(stream_config(sources["jsonl"], held_out_fraction=1e-9), SEED)


def tokens_equal(one: Data, other: Data, count: int) -> bool:
    return one.held_out.batch(range(count)).tokens.equal(other.held_out.batch(range(count)).tokens)


def test_the_number_of_workers_changes_nothing(sources, bpe_file: Path) -> None:
    tokenizer = {"type": "huggingface", "path": str(bpe_file)}
    found = []
    for workers in (0, 1, 2):
        config = stream_config(sources["jsonl"], {"shuffle_documents": 7, "workers": workers}, tokenizer=tokenizer)
        data = open_data(config, SEED)
        found.append((data.fingerprint, [tokens(data, range(first, first + 20)) for first in range(0, 200, 20)]))
        data.close()
    assert found[0] == found[1] == found[2]
    assert not [child for child in multiprocessing.active_children() if "Spawn" in type(child).__name__]


def test_a_worker_that_is_killed_is_told(sources) -> None:
    data = open_data(stream_config(sources["jsonl"], {"shuffle_documents": 7, "workers": 1}), SEED)
    tokens(data, range(1))
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a process that tokenizes was ended from outside.*lower data.stream.workers"):
        for first in range(0, 1000, 20):
            tokens(data, range(first, first + 20))
    data.close()


def test_a_mixture_of_streams_and_others(sources) -> None:
    names = {"files": "text_files", "lines": "jsonl", "rows": "hub_streaming"}
    mixture = {name: {"source": sources[kind], "weight": 1 + len(name)} for name, kind in names.items()}
    config = stream_config(None, mixture=mixture)
    unbroken = open_data(config, SEED)
    expected = tokens(unbroken, range(200))
    first = open_data(config, SEED)
    tokens(first, range(77))
    bookmarks = json.loads(json.dumps(first.bookmarks(77)))
    assert set(bookmarks) == set(names)
    second = open_data(config, SEED)
    second.train.go_on([Phase(**dataclasses.asdict(phase)) for phase in first.train.order.phases], 77)
    second.go_on(bookmarks | {"gone": {}})
    assert tokens(second, range(77, 200)) == expected[77:]
    assert second.summary.train.counts is None and second.summary.train.samples_per_epoch is None
    assert set(second.train.epochs(150)) == set(names)


def test_best_fit_streams_mix_with_others(sources) -> None:
    mixture = {
        "files": {"source": sources["text_files"], "weight": 1},
        "rows": {"source": sources["jsonl"], "weight": 1},
    }
    data = open_data(stream_config(None, mixture=mixture, packing="best_fit"), SEED)
    together = data.train.batch(range(30))
    alone = [data.train.batch([index]) for index in range(30)]
    for row, batch in enumerate(alone):
        assert together.tokens[row].equal(batch.tokens[0]) and together.labels[row].equal(batch.labels[0])
        assert together.document_starts[row].equal(batch.document_starts[0])


def test_fingerprints_follow_what_decides_the_stream(sources) -> None:
    first = open_data(stream_config(sources["jsonl"]), SEED).fingerprint
    assert open_data(stream_config(sources["jsonl"], {"shuffle_documents": 7, "workers": 1}), SEED).fingerprint == first
    for changed in (
        stream_config(sources["jsonl"], {"shuffle_documents": 8, "workers": 0}),
        stream_config(sources["jsonl"], held_out_fraction=0.3),
        stream_config(sources["jsonl"], sequence_length=32),
        stream_config(sources["jsonl"], packing="best_fit"),
        stream_config(sources["jsonl_gz"]),
    ):
        assert open_data(changed, SEED).fingerprint != first


def test_too_many_bad_records_over_a_resume(sources) -> None:
    limited = sources["jsonl"] | {"maximum_bad_records": 2}
    data = open_data(stream_config(limited, held_out_fraction=0.4, stream={"held_out_samples": 1, "workers": 0}), SEED)
    with pytest.raises(DataError, match="2.jsonl line 8 is not valid JSON.*bad record number 3"):
        tokens(data, range(400))
    # One of the three lies before the bookmark; it is not forgotten.
    stream = {"held_out_samples": 1, "workers": 0, "shuffle_documents": 7}
    data = open_data(stream_config(limited, held_out_fraction=0.4, stream=stream), SEED)
    tokens(data, range(20))
    bookmarks = data.bookmarks(20)
    assert bookmarks["source"]["cursor"]["skipped"] == 1
    data = open_data(stream_config(limited, held_out_fraction=0.4, stream=stream), SEED)
    data.go_on(bookmarks)
    with pytest.raises(DataError, match="bad record number 3"):
        tokens(data, range(20, 400))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_directory": "somewhere"}, "stream keeps no tokenized text, so leave out cache_directory"),
        ({"source": {"type": "megatron_indexed", "path_prefix": "x"}}, "tokenized already .*leave out stream"),
        ({"stream": {"shuffle_documents": 0}}, "greater than or equal to 1"),
        ({"stream": {"workers": -1}}, "greater than or equal to 0"),
        ({"packing": "tight"}, "'concatenate' or 'best_fit'"),
    ],
)
def test_configurations_that_say_nothing_sensible(sources, settings, message) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        stream_config(**{"source": sources["jsonl"]} | settings)


def test_held_out_agrees_with_the_prepared_split(sources) -> None:
    identities = [document.identity for document in _documents(sources["jsonl"])]
    assert 5 < sum(held_out(identity, 0.2) for identity in identities) < 40


def _documents(source: dict[str, Any]) -> list[Document]:
    from data.sources import open_source

    return list(open_source(stream_config(source).source).documents())
