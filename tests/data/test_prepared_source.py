"""``data.source.type: prepared``: read in place, equal to what memory holds, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.dataset import open_data
from data.errors import DataError
from data.prepare import prepare
from data.prepared import PreparedDocuments, open_directory
from tests.data.preparing import all_documents, data_config, prepare_into, text_config, write_texts

TOKENIZERS = ["bytes", "huggingface"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


@pytest.fixture
def out(texts: Path, tmp_path: Path) -> Path:
    prepare_into(tmp_path / "out", text_config(texts))
    return tmp_path / "out"


def prepared_config(directory: Path, **settings):
    return data_config({"type": "prepared", "path": str(directory)}, **settings)


def train_documents(directory: Path) -> PreparedDocuments:
    return open_directory(directory)[1]["train"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_run_reads_what_it_would_have_tokenized(texts: Path, tmp_path: Path, bpe_file: Path, kind: str) -> None:
    tokenizer = {"type": kind} | ({"path": str(bpe_file)} if kind == "huggingface" else {})
    in_memory = open_data(text_config(texts, tokenizer=tokenizer), seed=3)
    prepare_into(tmp_path / "out", text_config(texts, tokenizer=tokenizer), shard_megabytes=256)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    if kind == "huggingface":
        tokenizer["path"] = str(moved / "tokenizer.json")
    # The directory has its own held-out split, whatever the fraction of the run.
    prepared = open_data(prepared_config(moved, tokenizer=tokenizer, held_out_fraction=0.4), seed=3)
    assert (prepared.fingerprint, prepared.summary) == (in_memory.fingerprint, in_memory.summary)
    for split in ("train", "held_out"):
        ours, theirs = (getattr(data, split).batch(range(20)) for data in (prepared, in_memory))
        assert np.array_equal(ours.tokens, theirs.tokens) and np.array_equal(ours.labels, theirs.labels)


def test_shards_are_one_split(texts: Path, tmp_path: Path, out: Path) -> None:
    in_memory = prepare(text_config(texts))
    in_place = prepare(prepared_config(out))
    for split in ("train", "held_out"):
        assert all_documents(in_place[split]) == all_documents(in_memory[split])
        assert in_place[split].lengths.dtype == np.int64
    several, one = (in_place["train"].counts, in_memory["train"].counts)
    assert several.sha256 != one.sha256 and several.tokens == one.tokens


def test_pieces_of_documents_are_parts_of_the_whole(out: Path) -> None:
    documents = train_documents(out)
    for number, whole in enumerate(all_documents(documents)):
        length = len(whole)
        for first, size in ((0, 0), (0, 1), (1, length - 1), (length - 1, 1), (length, 0), (length // 2, length // 3)):
            ids = np.empty(size, dtype=np.int64)
            documents.read(number, first, ids)
            assert ids.tolist() == whole[first : first + size]


def test_shards_are_opened_again_and_threads_do_not_disturb_each_other(out: Path, monkeypatch) -> None:
    whole = all_documents(train_documents(out))
    monkeypatch.setattr("data.prepared._OPEN_SHARDS", 1)
    documents = pickle.loads(pickle.dumps(train_documents(out)))
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: all_documents(documents), range(8)):
            assert found == whole


def test_a_mixture_of_prepared_sources(texts: Path, tmp_path: Path) -> None:
    other = write_texts(tmp_path / "other", count=60, seed=1)
    sources = {}
    for name, path in (("texts", texts), ("other", other)):
        prepare_into(tmp_path / "mixed" / name, text_config(path))
        sources[name] = {"source": {"type": "prepared", "path": str(tmp_path / "mixed" / name)}, "weight": 1.0}
    settings = {"source": None, "mixture": sources, "tokenizer": {"type": "bytes"}, "sequence_length": 32}
    data = open_data(text_config(texts).model_validate(settings), seed=0)
    assert set(data.summaries) == {"texts", "other"}
    assert data.train.batch(range(4)).tokens.shape == (4, 32)
    with pytest.raises(DataError, match="mixed holds several prepared sources .other, texts.; give one of these"):
        open_data(prepared_config(tmp_path / "mixed"), seed=0)
    shutil.rmtree(tmp_path / "mixed" / "other")
    with pytest.raises(DataError, match="data.mixture.other: .*other does not exist"):
        open_data(text_config(texts).model_validate(settings), seed=0)


def refused(out: Path, message: str, **settings) -> None:
    with pytest.raises(DataError, match=message):
        open_data(prepared_config(out, **settings), seed=0)


def test_what_is_no_finished_directory(texts: Path, tmp_path: Path, out: Path) -> None:
    refused(tmp_path / "none", "none does not exist; give a directory that `pretrain data prepare` wrote")
    refused(texts, "texts has no manifest.json, so it is no directory that `pretrain data prepare` finished")
    (out / "manifest.json").rename(out / "unfinished.json")
    refused(out, "out is unfinished: .*start `pretrain data prepare` again")


def test_another_tokenizer(out: Path, bpe_file: Path, monkeypatch) -> None:
    tokenizer = {"type": "huggingface", "path": str(bpe_file)}
    refused(out, "out was prepared with another tokenizer .fingerprint bytes-257, with 257 ids", tokenizer=tokenizer)
    monkeypatch.setattr("data.tokenizers.byte_level.ByteTokenizer.vocab_size", 300)
    refused(out, "out has ids below 257, the mark 256, but data.tokenizer has 300 and 256; prepare the text anew")


def test_another_version_of_a_tokenizers_library(texts: Path, tmp_path: Path, bpe_file: Path, monkeypatch) -> None:
    config = text_config(texts, tokenizer={"type": "huggingface", "path": str(bpe_file)})
    prepare_into(tmp_path / "out", config)
    copy = {"type": "huggingface", "path": str(tmp_path / "out" / "tokenizer.json")}
    open_data(prepared_config(tmp_path / "out", tokenizer=copy), seed=0)
    monkeypatch.setattr("tokenizers.__version__", "0.0.1")
    refused(tmp_path / "out", "out/tokenizer.json, in the same version of its library", tokenizer=copy)


@pytest.mark.parametrize("name", ["train-00001.bin", "held_out-00000.idx", "train-00002.idx"])
def test_a_file_of_another_size_is_refused_at_once(out: Path, name: str) -> None:
    whole = (out / name).read_bytes()
    for content in (whole[:-2], whole + b"\0", b""):
        (out / name).write_bytes(content)
        refused(out, f"{name} has {len(content)} bytes, but {len(whole)} when it was written.*copy it")
    (out / name).unlink()
    refused(out, f"{name} cannot be read .No such file.*manifest; copy it again")


def test_an_index_that_does_not_fit_its_manifest(out: Path) -> None:
    path = out / "train-00001.idx"
    whole = path.read_bytes()
    documents = int.from_bytes(whole[18:26], "little")
    more = (1 + int.from_bytes(whole[34:38], "little")).to_bytes(4, "little")
    swapped = (documents + 1).to_bytes(8, "little") + (documents - 1).to_bytes(8, "little")
    for content, message in (
        (b"another format" * 99, "does not begin as"),
        (whole[:17] + b"\x04" + whole[18:], "its ids are int32 instead of uint16"),
        (whole[:34] + more + whole[38:], "it has .* documents and .* tokens, not"),
        (whole[:18] + swapped + whole[34:], "by its own counts"),
        (whole[:34] + bytes(4 * documents) + whole[34 + 4 * documents :], "tokens, not"),
    ):
        path.write_bytes(content[: len(whole)])
        refused(out, f"train-00001.idx is damaged .*{message}.*copy it again")


def test_a_damaged_manifest(out: Path) -> None:
    path = out / "manifest.json"
    whole = path.read_text()
    tokens = json.loads(whole)["train"]["tokens"]
    for content, message in (
        (whole[:300], "EOF"),
        (whole.replace(str(tokens), str(tokens + 1)), "its own SHA-256 differs"),
        (whole.replace('"format_version": 2', '"format_version": 3'), "format_version"),
        (whole.replace("train-00001.bin", "../train-00001.bin"), "name"),
        ("[]", "."),
    ):
        path.write_text(content)
        refused(out, f"manifest.json is damaged or of another format version .*{message}.*prepare it anew")


class TestDamageWhileReading:
    """What happens to files behind the back of a run that has opened them."""

    def test_a_file_that_is_cut_short(self, out: Path) -> None:
        documents = train_documents(out)
        (out / "train-00000.bin").write_bytes((out / "train-00000.bin").read_bytes()[:100])
        with pytest.raises(DataError, match="train-00000.bin ends at byte 100.*cut short"):
            all_documents(documents)

    def test_a_file_that_is_gone(self, out: Path) -> None:
        documents = train_documents(out)
        (out / "train-00001.bin").unlink()
        with pytest.raises(DataError, match="train-00001.bin cannot be read .No such file or directory"):
            all_documents(documents)

    def test_a_disk_that_fails(self, out: Path, monkeypatch) -> None:
        def fails(*_: object) -> int:
            raise OSError(5, "Input/output error")

        documents = train_documents(out)
        monkeypatch.setattr("os.preadv", fails)
        with pytest.raises(DataError, match="train-00000.bin cannot be read .Input/output error.; check the file"):
            all_documents(documents)

    def test_ids_that_no_tokenizer_has(self, out: Path) -> None:
        path = out / "train-00001.bin"
        whole = path.read_bytes()
        number = int.from_bytes((out / "train-00000.idx").read_bytes()[18:26], "little")  # documents before it
        path.write_bytes(whole[:8] + b"\x02\x01" + whole[10:])
        with pytest.raises(DataError, match=f"train-00001.bin is damaged: .*document {number} holds the id 258,"):
            all_documents(train_documents(out))
        path.write_bytes(b"\x20\x00" + whole[2:])
        with pytest.raises(DataError, match="train-00001.bin is damaged: .*the id 32 where a document begins"):
            all_documents(train_documents(out))

    def test_negative_ids(self, texts: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr("data.tokenizers.byte_level.ByteTokenizer.vocab_size", 70_000)
        prepare_into(tmp_path / "wide", text_config(texts))
        path = tmp_path / "wide" / "train-00000.bin"
        whole = path.read_bytes()
        path.write_bytes(whole[:4] + b"\xff\xff\xff\xff" + whole[8:])
        with pytest.raises(DataError, match="train-00000.bin is damaged: .*document 0 holds the id 4294967295"):
            all_documents(train_documents(tmp_path / "wide"))

    def test_a_batch_names_the_file(self, out: Path) -> None:
        data = open_data(prepared_config(out), seed=0)
        for path in out.glob("train-*.bin"):
            path.write_bytes(b"\xff" * path.stat().st_size)
        with pytest.raises(DataError, match=r"train-0000\d.bin is damaged"):
            data.train.batch(range(8))
