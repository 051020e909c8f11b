"""From a config to samples: the cache, several processes at once, the standard library, errors."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.dataset import Data, open_data
from data.errors import DataError
from data.preparation.verifying import verify
from data.sources import open_source
from data.splitting import held_out, identity_position
from tests.data.preparing import all_documents


def config(source: dict, **settings: object) -> DataConfig:
    return DataConfig.model_validate(
        {"source": source, "tokenizer": {"type": "bytes"}, "sequence_length": 32, "held_out_fraction": 0.1} | settings
    )


def text_files(path: Path, **settings: object) -> DataConfig:
    return config({"type": "text_files", "path": str(path)}, **settings)


def prepared_directory(cache: Path) -> Path:
    (directory,) = (path for path in cache.iterdir() if path.is_dir())
    return directory


def stored_documents(data: Data, split: str) -> list[bytes]:
    pieces = all_documents(getattr(data, split).documents)
    assert all(piece[0] == data.tokenizer.boundary_id for piece in pieces)
    return [data.tokenizer.decode(piece[1:]) for piece in pieces]


def is_whole(cache: Path) -> bool:
    """Whether the only prepared directory of a cache is finished and undamaged, and nothing else lies there."""
    (directory,) = cache.iterdir()
    return verify(directory).problems == [] and not list(directory.glob("*.partial-*"))


def test_every_document_is_on_its_side(text_directory: Path) -> None:
    data = open_data(text_files(text_directory), seed=0)
    names = sorted(p.relative_to(text_directory).as_posix() for p in text_directory.rglob("*.txt"))
    for split, wanted in (("train", False), ("held_out", True)):
        expected = [(text_directory / n).read_bytes() for n in names if held_out(n, 0.1) is wanted]
        assert stored_documents(data, split) == expected
        counts = getattr(data.summary, split).counts
        assert (counts.documents, counts.bytes) == (len(expected), sum(map(len, expected)))
        assert counts.tokens == counts.documents + counts.bytes
    assert data.train.documents.tokens.dtype == np.uint16


def test_the_split_is_stable_when_documents_come_and_go(text_directory: Path) -> None:
    before = set(stored_documents(open_data(text_files(text_directory), seed=0), "held_out"))
    for number in range(0, 100, 2):
        (text_directory / "even" / f"{number}.txt").unlink()
        (text_directory / f"new {number}.txt").write_text(f"new {number}")
    after = open_data(text_files(text_directory), seed=5)
    assert before.isdisjoint(stored_documents(after, "train"))
    assert before & set(stored_documents(after, "held_out"))


@pytest.mark.parametrize("kind", ["bytes", "huggingface", "sentencepiece"])
def test_the_cache_changes_nothing(
    text_directory: Path, tmp_path: Path, bpe_file: Path, sentencepiece_file: Path, kind: str
) -> None:
    paths = {"huggingface": str(bpe_file), "sentencepiece": str(sentencepiece_file)}
    tokenizer = {"type": kind} | ({"path": paths[kind]} if kind in paths else {})
    cache = tmp_path / "cache"
    in_memory = open_data(text_files(text_directory, tokenizer=tokenizer), seed=1)
    cached = text_files(text_directory, tokenizer=tokenizer, cache_directory=str(cache))
    for _ in range(2):
        data = open_data(cached, seed=1)
        assert (data.fingerprint, data.summary) == (in_memory.fingerprint, in_memory.summary)
        assert data.train.batch(range(9)).tokens.tolist() == in_memory.train.batch(range(9)).tokens.tolist()
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1
    assert is_whole(cache)


def test_the_second_start_does_not_tokenize(text_directory: Path, tmp_path: Path, monkeypatch) -> None:
    cached = text_files(text_directory, cache_directory=str(tmp_path / "cache"))
    first = open_data(cached, seed=0)
    monkeypatch.setattr("data.text_files.FileDocuments.documents", None)
    longer = cached.model_copy(update={"sequence_length": 64})
    assert open_data(cached, seed=0).fingerprint == first.fingerprint
    assert open_data(longer, seed=0).fingerprint != first.fingerprint


def test_a_changed_file_is_read_again(text_directory: Path, tmp_path: Path) -> None:
    cached = text_files(text_directory, cache_directory=str(tmp_path / "cache"))
    first = open_data(cached, seed=0)
    (text_directory / "odd" / "7.txt").write_text("another length of text")
    second = open_data(cached, seed=0)
    assert second.fingerprint != first.fingerprint
    assert b"another length of text" in stored_documents(second, "train") + stored_documents(second, "held_out")


def test_one_cache_serves_many_configs(text_directory: Path, tmp_path: Path, bpe_file: Path) -> None:
    tokenizer = {"type": "huggingface", "path": str(bpe_file)}
    variants = [{}, {"held_out_fraction": 0.3}, {"tokenizer": tokenizer}]
    for _ in range(2):
        for settings in variants:
            cached = text_files(text_directory, cache_directory=str(tmp_path / "cache"), **settings)
            expected = open_data(text_files(text_directory, **settings), seed=0)
            assert open_data(cached, seed=0).fingerprint == expected.fingerprint


def _fingerprint_in_a_process(settings: dict, results) -> None:
    results.put(open_data(DataConfig.model_validate(settings), seed=0).fingerprint)


def test_several_processes_may_open_at_once(text_directory: Path, tmp_path: Path) -> None:
    cached = text_files(text_directory, cache_directory=str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_fingerprint_in_a_process, args=(cached.model_dump(), results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    try:
        fingerprints = {results.get(timeout=60) for _ in processes}
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    assert fingerprints == {open_data(text_files(text_directory), seed=0).fingerprint}
    assert is_whole(tmp_path / "cache")


def test_without_locks_the_first_to_finish_is_kept(text_directory: Path, tmp_path: Path, monkeypatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    cache = tmp_path / "cache"
    cached = text_files(text_directory, cache_directory=str(cache))
    monkeypatch.setattr("fcntl.flock", no_locks)
    replace = Path.replace

    def someone_else_is_faster(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        open_data(cached, seed=0)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", someone_else_is_faster)
    data = open_data(cached, seed=0)
    assert data.fingerprint == open_data(text_files(text_directory), seed=0).fingerprint
    assert is_whole(cache)


def test_an_interrupted_preparation_is_not_taken_for_a_whole_one(
    text_directory: Path, tmp_path: Path, monkeypatch
) -> None:
    cache = tmp_path / "cache"
    cached = text_files(text_directory, cache_directory=str(cache))
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_data(cached, seed=0)
    directory = prepared_directory(cache)
    assert not (directory / "manifest.json").exists() and not list(directory.glob("*.partial-*"))
    monkeypatch.undo()
    assert open_data(cached, seed=0).fingerprint == open_data(text_files(text_directory), seed=0).fingerprint
    assert is_whole(cache)


def test_damaged_prepared_data(text_directory: Path, tmp_path: Path) -> None:
    cached = text_files(text_directory, cache_directory=str(tmp_path / "cache"))
    open_data(cached, seed=0)
    directory = prepared_directory(tmp_path / "cache")
    tokens = directory / "train-00000.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:10] + b"\x01" + whole[11:])
    (problem,) = verify(directory).problems
    assert "train-00000.bin has changed since it was written" in problem
    for damaged in (whole[:-2], whole[:-1], b""):
        tokens.write_bytes(damaged)
        with pytest.raises(DataError, match="train-00000.bin has .* bytes, but .* when it was written.*anew"):
            open_data(cached, seed=0)
    tokens.write_bytes(whole)
    (directory / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match="manifest.json is damaged .*or delete"):
        open_data(cached, seed=0)


def test_a_cache_that_cannot_be_written(text_directory: Path) -> None:
    with pytest.raises(DataError, match="cache_directory .* cannot be written .*give a writable directory"):
        open_data(text_files(text_directory, cache_directory="/dev/null/cache"), seed=0)


def test_text_tokenizers_count_documents_that_are_not_utf8(text_directory: Path, bpe_file: Path) -> None:
    for number in range(3):
        (text_directory / f"latin {number}.txt").write_bytes(b"caf\xe9")
    tokenizer = {"type": "huggingface", "path": str(bpe_file)}
    for settings, expected in ({}, 0), ({"tokenizer": tokenizer}, 3):
        summary = open_data(text_files(text_directory, **settings), seed=0).summary
        counts = (summary.train.counts, summary.held_out.counts)
        assert sum(c.invalid_utf8_documents for c in counts) == expected


def test_empty_documents_are_left_out_and_counted(text_directory: Path) -> None:
    without = open_data(text_files(text_directory), seed=0)
    for number in range(40):
        (text_directory / f"empty {number}.txt").touch()
    data = open_data(text_files(text_directory), seed=0)
    assert data.fingerprint == without.fingerprint
    summary = data.summary
    assert summary.train.counts.empty_documents + summary.held_out.counts.empty_documents == 40


def test_the_fingerprint_follows_what_decides_the_samples(text_directory: Path, tmp_path: Path) -> None:
    first = open_data(text_files(text_directory), seed=0).fingerprint
    moved = text_directory.rename(tmp_path / "moved")
    assert open_data(text_files(moved), seed=0).fingerprint == first
    for settings, seed in (({}, 1), ({"sequence_length": 33}, 0), ({"held_out_fraction": 0.2}, 0)):
        assert open_data(text_files(moved, **settings), seed=seed).fingerprint != first


def test_the_summary_is_plain_data(text_directory: Path) -> None:
    data = open_data(text_files(text_directory), seed=0)
    summary = json.loads(json.dumps(data.summary.to_dict()))
    assert summary["train"]["samples_per_epoch"] == data.train.samples_per_epoch
    assert summary["held_out"]["counts"]["documents"] == data.summary.held_out.counts.documents


def test_too_few_documents_to_hold_one_out(tmp_path: Path) -> None:
    path = tmp_path / "only.txt"
    path.write_text("the only document " * 100)
    assert held_out("only.txt", 0.1) and not held_out("only.txt", 0.02)
    with pytest.raises(DataError, match="all 1 documents .* held out; .*document_separator"):
        open_data(text_files(path), seed=0)
    with pytest.raises(DataError, match="none of the 1 documents .*above 0.0[0-9]*, .*document_separator"):
        open_data(text_files(path, held_out_fraction=0.02), seed=0)
    two = "the first of two documents " * 100 + "<end>" + "the second of two documents " * 100
    path.write_text(two)
    source = {"type": "text_files", "path": str(path), "document_separator": "<end>"}
    fractions = [identity_position(d.identity) for d in open_source(config(source).source).documents()]
    between = min(fractions) + 1e-6
    assert between < 0.5
    assert open_data(config(source, held_out_fraction=between), seed=0).summary.held_out.counts.documents == 1


def test_empty_and_small_sources(tmp_path: Path, text_directory: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="no document with any text"):
        open_data(text_files(tmp_path / "empty.txt"), seed=0)
    with pytest.raises(DataError, match="training split has .* tokens.*sequence_length 1000000"):
        open_data(text_files(text_directory, sequence_length=1_000_000), seed=0)
    with pytest.raises(DataError, match="seed of the data order is -1"):
        open_data(text_files(text_directory), seed=-1)


def test_the_standard_library_end_to_end() -> None:
    data = open_data(config({"type": "standard_library"}, sequence_length=256, held_out_fraction=0.02), seed=0)
    assert data.summary.train.counts.bytes > 10_000_000
    assert data.summary.train.counts.documents > 500 < 50 * data.summary.held_out.counts.documents
    batch = data.train.batch(range(16))
    assert batch.tokens.shape == (16, 256) and batch.label_count == 16 * 256
    assert "def " in data.tokenizer.decode_text(batch.tokens.numpy())
