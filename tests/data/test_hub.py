"""Documents through Hugging Face datasets: formats, filters, bad records, networks that fail."""

from __future__ import annotations

import bz2
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter

import data.hub
from data.config import DataConfig, SourceConfig
from data.dataset import open_data
from data.errors import DataError
from data.hub import HubDocuments
from data.source import Document, Source
from data.sources import open_source

ROWS = [{"text": f"text {number} é", "meta": {"language": "en" if number % 3 else "de"}} for number in range(30)]


def source(**settings: Any) -> Source:
    return open_source(TypeAdapter(SourceConfig).validate_python({"type": "huggingface"} | settings))


def contents(opened: Source) -> list[str]:
    return [document.content.decode() for document in opened.documents()]


@pytest.fixture(autouse=True)
def datasets_keeps_its_copies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same rows in several formats, parquet and JSON in two files."""
    table = pyarrow.Table.from_pylist(ROWS)
    found = {name: tmp_path / name for name in ("parquet", "json", "arrow")}
    for directory in found.values():
        directory.mkdir()
    for index, part in enumerate((slice(0, 20), slice(20, None))):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[part]), found["parquet"] / f"{index}.parquet")
        lines = "".join(json.dumps(row) + "\n" for row in ROWS[part])
        (found["json"] / f"{index}.jsonl").write_text(lines)
    with pyarrow.ipc.new_stream(found["arrow"] / "0.arrow", table.schema) as stream:
        stream.write_table(table)
    return found


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["parquet", "json", "arrow"])
def test_local_files_of_any_format(files, kind: str, streaming: bool) -> None:
    opened = source(path=kind, data_files=f"{files[kind]}/*", streaming=streaming)
    assert contents(opened) == [row["text"] for row in ROWS]
    assert contents(opened) == [row["text"] for row in ROWS], "a second reading"


def test_a_local_directory(files) -> None:
    assert contents(source(path=str(files["parquet"]))) == [row["text"] for row in ROWS]


def test_files_in_a_store(files) -> None:
    store = fsspec.filesystem("memory")
    for path in files["parquet"].iterdir():
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    opened = source(path="parquet", data_files="memory://bucket/*.parquet")
    assert contents(opened) == [row["text"] for row in ROWS]
    first = opened.fingerprint()
    assert first == source(path="parquet", data_files="memory://bucket/*.parquet", streaming=False).fingerprint()
    store.pipe("/bucket/1.parquet", files["parquet"].joinpath("0.parquet").read_bytes())
    assert opened.fingerprint() != first
    with pytest.raises(DataError, match="data_files memory://bucket/.*.json matches no file"):
        source(path="json", data_files="memory://bucket/*.json").fingerprint()


def test_filters(files) -> None:
    opened = source(path="parquet", data_files=f"{files['parquet']}/*", keep={"meta.language": ["de", "fr"]})
    assert contents(opened) == [row["text"] for row in ROWS[::3]]
    assert opened.reader.filtered == 20
    opened = source(path="parquet", data_files=f"{files['parquet']}/*", minimum_characters=9)
    assert contents(opened) == [row["text"] for row in ROWS[10:]]
    opened = source(path="parquet", data_files=f"{files['parquet']}/*", maximum_characters=8)
    assert contents(opened) == [row["text"] for row in ROWS[:10]]


def test_a_row_without_its_text_is_named(files) -> None:
    with pytest.raises(DataError, match=r"dataset parquet .*row 0 should hold a string under 'body'.*'text'"):
        contents(source(path="parquet", data_files=f"{files['parquet']}/*", text_field="body"))


def test_samples_of_a_run_are_those_of_the_same_rows_as_jsonl(files) -> None:
    settings = {"tokenizer": {"type": "bytes"}, "sequence_length": 16, "held_out_fraction": 0.2}
    sources = [
        {"type": "huggingface", "path": "parquet", "data_files": f"{files['parquet']}/*"},
        {"type": "huggingface", "path": "json", "data_files": f"{files['json']}/*", "streaming": False},
    ]
    first, second = (open_data(DataConfig.model_validate({"source": one} | settings), seed=0) for one in sources)
    assert first.fingerprint == second.fingerprint
    assert first.summary.train.counts.documents + first.summary.held_out.counts.documents == len(ROWS)


def test_fingerprint_of_local_files(files) -> None:
    def fingerprint(**settings: Any) -> str:
        return source(path="parquet", data_files=f"{files['parquet']}/*", **settings).fingerprint()

    first = fingerprint()
    assert first == fingerprint(streaming=False)
    assert first != fingerprint(minimum_characters=3)
    (files["parquet"] / "1.parquet").touch()
    assert first != fingerprint()


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data_files .*nothing.* matches no file"):
        source(path="parquet", data_files=f"{tmp_path}/nothing*.parquet")
    with pytest.raises(DataError, match="reads files, so data.source.data_files must name them"):
        source(path="parquet")


def test_a_damaged_local_file_is_not_asked_again(files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.hub.time, "sleep", lambda _: pytest.fail("asked again"))
    (files["parquet"] / "1.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"dataset parquet .*cannot be read at row"):
        contents(source(path="parquet", data_files=f"{files['parquet']}/*"))


class Flaky:
    """A dataset whose rows fail at given reads; its rows are their own iterator without a state."""

    class Rows(Iterator):
        def __init__(self, rows: Iterator[Any]) -> None:
            self._rows = rows

        def __next__(self) -> Any:
            return next(self._rows)

        def state(self) -> None:
            return None

    def __init__(self, failures: list[int], error: Exception) -> None:
        self.failures, self.error, self.openings = list(failures), error, []

    def open(self, first: int, state: None) -> Flaky.Rows:
        assert state is None
        self.openings.append(first)
        return self.Rows(self.rows(first))

    def rows(self, first: int) -> Iterator[Any]:
        for row in range(first, len(ROWS)):
            if self.failures and self.failures[0] == row:
                self.failures.pop(0)
                raise self.error
            yield ROWS[row]


def test_a_network_that_fails_is_asked_again_from_where_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(data.hub.time, "sleep", waited.append)
    opened = source(path="someone/corpus")
    flaky = Flaky([4, 4, 17], ConnectionError("gone"))
    monkeypatch.setattr(HubDocuments, "_rows", lambda self, first, state: flaky.open(first, state))
    assert contents(opened) == [row["text"] for row in ROWS]
    # After a success the waiting begins anew.
    assert (waited, flaky.openings) == ([1, 4, 1], [0, 4, 4, 17])


def test_a_network_that_stays_away_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.hub.time, "sleep", lambda _: None)
    flaky = Flaky([7] * 9, ConnectionError("gone"))
    monkeypatch.setattr(HubDocuments, "_rows", lambda self, first, state: flaky.open(first, state))
    with pytest.raises(DataError, match=r"dataset someone/corpus cannot be read at row 7 \(ConnectionError: gone\)"):
        contents(source(path="someone/corpus"))
    assert len(flaky.openings) == 1 + len(data.hub.RETRY_SECONDS)


def test_the_fingerprint_of_the_hub_is_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    pinned = source(path="someone/corpus", revision=commit).fingerprint()
    monkeypatch.setattr(HubDocuments, "_commit", lambda self: commit)
    assert source(path="someone/corpus").fingerprint() == pinned

    def unreachable(self: HubDocuments) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(HubDocuments, "_commit", unreachable)
    monkeypatch.setattr(data.hub.time, "sleep", lambda _: None)
    with pytest.raises(DataError, match="someone/corpus cannot be found .*no route.*set data.source.revision"):
        source(path="someone/corpus").fingerprint()


@pytest.mark.parametrize(("ending", "pack"), [("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_jsonl(tmp_path: Path, ending: str, pack: Any) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path = tmp_path / f"rows.jsonl.{ending}"
    path.write_bytes(pack(lines))
    opened = source(type="jsonl", path=str(path))
    assert contents(opened) == [row["text"] for row in ROWS]
    path.write_bytes(pack(lines)[:-20])
    with pytest.raises(DataError, match=f"rows.jsonl.{ending} cannot be read"):
        contents(opened)


class TestBadRecords:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "one"}\n{broken\n{"body": "two"}\n{"text": "three"}\n[4]\n')
        return path

    def documents(self, path: Path, **settings: Any) -> list[Document]:
        return list(source(type="jsonl", path=str(path), **settings).documents())

    def test_stop(self, path: Path) -> None:
        with pytest.raises(DataError, match="a.jsonl line 2 is not valid JSON.*or set bad_records to skip"):
            self.documents(path)

    def test_skip(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        found = self.documents(path, bad_records="skip")
        assert [document.content for document in found] == [b"one", b"three"]
        messages = [record.getMessage() for record in caplog.records]
        assert [f"a.jsonl line {line} " in message for line, message in zip((2, 3, 5), messages, strict=True)] == [
            True
        ] * 3

    def test_too_many(self, path: Path) -> None:
        with pytest.raises(DataError, match="line 5 .*bad record number 3, and maximum_bad_records is 2"):
            self.documents(path, bad_records="skip", maximum_bad_records=2)
