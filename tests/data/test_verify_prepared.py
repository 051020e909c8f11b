"""Verifying prepared data: whatever is damaged is found, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data.errors import DataError
from data.preparation.manifest import Plan, ShardRecord, finished_manifest, read_manifest, write_record
from data.preparation.verifying import total_bytes, verify
from tests.data.preparing import contents, prepare_into, text_config, write_texts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, bpe_file: Path) -> Path:
    root = tmp_path_factory.mktemp("whole")
    texts = write_texts(root / "texts")
    tokenizer = {"type": "huggingface", "path": str(bpe_file)}
    prepare_into(root / "out", text_config(texts, tokenizer=tokenizer))
    return root / "out"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def test_everything_is_read_and_right(whole: Path) -> None:
    read = []
    found = verify(whole, read.append)
    manifest = read_manifest(whole)
    files = contents(whole)
    assert found.problems == [] and found.has_checksums
    assert found.files == len(files) == len(manifest.files()) + 1
    assert found.bytes == sum(read) == sum(len(content) for name, content in files.items() if name != "manifest.json")
    assert found.bytes <= total_bytes(whole)
    assert found.documents == manifest.train.documents + manifest.held_out.documents
    assert found.tokens == manifest.train.tokens + manifest.held_out.tokens


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_named(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(contents(whole))))
    content = bytearray((whole / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << (bit % 8)
    out = tmp_path_factory.mktemp("flipped") / "out"
    shutil.copytree(whole, out)
    (out / name).write_bytes(content)
    problems = verify(out).problems
    assert len(problems) == 1 and problems[0].startswith(f"{out / name} ")


@pytest.mark.parametrize("name", ["train-00001.bin", "held_out-00001.bin", "train-00002.idx", "tokenizer.json"])
def test_a_file_of_another_size(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    for damaged, message in (
        (content[:-1], f"has {len(content) - 1} bytes instead of {len(content)}: it was cut short"),
        (b"", "has 0 bytes instead"),
        (content + b"\0", f"has {len(content) + 1} bytes instead of {len(content)}: something was written behind"),
    ):
        (copy / name).write_bytes(damaged)
        (problem,) = verify(copy).problems
        assert problem.startswith(f"{copy / name} ") and message in problem
    (copy / name).unlink()
    (problem,) = verify(copy).problems
    assert problem == f"{copy / name} cannot be read (No such file or directory)."


def test_every_damaged_file_is_named(copy: Path) -> None:
    damaged = ["held_out-00000.bin", "tokenizer.json", "train-00001.bin", "train-00002.idx"]
    for name in damaged:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    problems = verify(copy).problems
    assert sorted(problem.split()[0] for problem in problems) == [str(copy / name) for name in damaged]
    assert all("has changed since it was written: its SHA-256 is not the manifest's" in problem for problem in problems)


def signed_anew(directory: Path, shard: int, change: Callable[[dict[str, np.ndarray | bytes]], None]) -> None:
    """Changes a shard's training files, and makes a manifest with which they agree."""
    import hashlib

    manifest = read_manifest(directory)
    binary, index = directory / f"train-{shard:05d}.bin", directory / f"train-{shard:05d}.idx"
    files = {"tokens": np.frombuffer(binary.read_bytes(), np.uint16).copy(), "index": index.read_bytes()}
    change(files)
    binary.write_bytes(files["tokens"].tobytes())
    index.write_bytes(files["index"])
    record = json.loads(manifest.shards[shard].model_dump_json())
    for key, path in (("binary", binary), ("index", index)):
        content = path.read_bytes()
        record["train"][key] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    record["train"]["tokens"] = len(files["tokens"])
    shards = [*manifest.shards]
    shards[shard] = ShardRecord.model_validate(record)
    plan = Plan.model_validate(manifest.model_dump(include=set(Plan.model_fields)))
    write_record(directory / "manifest.json", finished_manifest(plan, shards, (0, 0), (0, 0)))


def put(position: int, value: int) -> Callable:
    def change(files: dict) -> None:
        files["tokens"][position] = value

    return change


def put_in_index(position: int, value: int, size: int) -> Callable:
    def change(files: dict) -> None:
        content = files["index"]
        files["index"] = content[:position] + value.to_bytes(size, "little") + content[position + size :]

    return change


def cut_tokens(files: dict) -> None:
    files["tokens"] = files["tokens"][:-1]


@pytest.mark.parametrize(
    ("change", "file", "message"),
    [
        (put(3, 399), "train-00001.bin", "its document 0 holds the id 399, but the tokenizer's are 0 to"),
        (put(0, 7), "train-00001.bin", "its document 0 does not begin with the mark 0"),
        (put(3, 0), "train-00001.bin", "marks (0) for"),
        (cut_tokens, "train-00001.idx", "documents and"),
        (put_in_index(34, 1, 4), "train-00001.idx", "sequence 1 does not start where the one before it ends"),
        (put_in_index(17, 99, 1), "train-00001.idx", "is no index of an indexed dataset (it does not begin as"),
    ],
)
def test_what_checksums_cannot_tell(copy: Path, change: Callable, file: str, message: str) -> None:
    assert read_manifest(copy).stored_vocab_size < 399
    signed_anew(copy, 1, change)
    (problem,) = verify(copy).problems
    assert problem.startswith(str(copy / file)) and message in problem


def test_the_sources_of_a_mixture(whole: Path, tmp_path: Path) -> None:
    for name in ("code", "web"):
        shutil.copytree(whole, tmp_path / "mixed" / name)
    single, both = verify(whole), verify(tmp_path / "mixed")
    assert (both.files, both.tokens, both.problems) == (2 * single.files, 2 * single.tokens, [])
    (tmp_path / "mixed" / "web" / "train-00000.bin").unlink()
    assert ["web/train-00000.bin" in problem for problem in verify(tmp_path / "mixed").problems] == [True]
    (tmp_path / "mixed" / "code" / "manifest.json").rename(tmp_path / "mixed" / "code" / "unfinished.json")
    with pytest.raises(DataError, match="code is unfinished"):
        verify(tmp_path / "mixed")


class TestIndexedDataset:
    """A dataset that somebody else wrote has no checksums: its structure is looked at."""

    @pytest.fixture
    def prefix(self, tmp_path: Path) -> Path:
        builder = IndexedDatasetBuilder(str(tmp_path / "corpus.bin"), dtype=np.int32)
        for number in range(1, 30):
            builder.add_item(torch.arange(number))
            builder.end_document()
        builder.finalize(str(tmp_path / "corpus.idx"))
        return tmp_path / "corpus"

    @pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
    def test_a_whole_one(self, prefix: Path, suffix: str) -> None:
        found = verify(Path(f"{prefix}{suffix}"))
        assert (found.problems, found.has_checksums, found.documents, found.tokens) == ([], False, 29, 435)
        assert found.bytes == total_bytes(prefix) and found.files == 2

    def test_damaged_ones(self, prefix: Path) -> None:
        binary, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        ids, header = binary.read_bytes(), index.read_bytes()

        def problem() -> str:
            (only,) = verify(prefix).problems
            return only

        binary.write_bytes(ids[:-2])
        assert problem() == f"{binary} has {len(ids) - 2} bytes, but its index says {len(ids)}."
        binary.write_bytes(ids[:-1] + b"\xff")
        assert problem().startswith(f"{binary} holds the id -")
        binary.write_bytes(ids)
        index.write_bytes(header[:50])
        assert problem().startswith(f"{index} is no index of an indexed dataset (it has 50 bytes")
        index.write_bytes(header[:34] + b"\x09" + header[35:])
        assert problem() == f"{index}: sequence 1 does not start where the one before it ends."
        index.write_bytes(header)
        binary.unlink()
        assert problem() == f"{binary} does not exist."

    def test_nothing_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="none does not exist; .*none.idx does not exist"):
            verify(tmp_path / "none")
        with pytest.raises(DataError, match="has no manifest.json"):
            verify(tmp_path)
