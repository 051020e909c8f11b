"""Preparing a source into a directory: what is written, duplicates, workers, other options, bad directories."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data.documents import SPLITS
from data.errors import DataError
from data.preparation.digests import SeenDigests, digest_of
from data.preparation.directory import PreparationState
from data.preparation.manifest import read_manifest
from data.preparation.memory import prepare_in_memory
from data.preparation.plan import Options
from data.prepared import open_directory
from data.splitting import held_out
from data.tokenizers import open_tokenizer
from tests.data.preparing import all_documents, contents, data_config, prepare_into, text_config, write_texts

MARK = 256


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


def test_shards_hold_the_documents_in_their_order(texts: Path, tmp_path: Path) -> None:
    manifest = prepare_into(tmp_path / "out", text_config(texts))
    assert len(manifest.shards) > 4
    names = [file.name for file in manifest.files()]
    assert sorted(contents(tmp_path / "out")) == sorted(["manifest.json", *names])
    files = sorted(texts.iterdir())
    _, splits = open_directory(tmp_path / "out")
    for split, wanted in (("train", False), ("held_out", True)):
        expected = [[MARK, *path.read_bytes()] for path in files if held_out(path.name, 0.2) is wanted]
        assert all_documents(splits[split]) == expected
        totals = manifest.train if split == "train" else manifest.held_out
        assert totals.documents == len(expected)
        assert totals.tokens == sum(map(len, expected)) == totals.bytes + totals.documents
    # A shard ends with the document that fills it, whichever split that belongs to.
    sizes = [shard.train.bytes + shard.held_out.bytes for shard in manifest.shards]
    assert all(4000 <= size < 5000 for size in sizes[:-1]) and sizes[-1] < 5000
    assert manifest == read_manifest(tmp_path / "out")


@pytest.mark.parametrize("kind", ["bytes", "huggingface", "sentencepiece"])
def test_megatron_reads_every_shard(
    texts: Path, tmp_path: Path, bpe_file: Path, sentencepiece_file: Path, kind: str
) -> None:
    paths = {"huggingface": str(bpe_file), "sentencepiece": str(sentencepiece_file)}
    config = text_config(texts, tokenizer={"type": kind} | ({"path": paths[kind]} if kind in paths else {}))
    manifest = prepare_into(tmp_path / "out", config)
    mark = open_tokenizer(config.tokenizer).boundary_id
    _, ours = open_directory(tmp_path / "out")
    for split in SPLITS:
        theirs: list[list[int]] = []
        for shard in manifest.shards:
            if (part := shard.part(split)).binary is not None:
                dataset = IndexedDataset(str(tmp_path / "out" / part.binary.name.removesuffix(".bin")))
                assert len(dataset.document_indices) == part.documents + 1
                theirs += [dataset[number].tolist() for number in range(len(dataset))]
        assert theirs == all_documents(ours[split])
        assert all(ids[0] == mark and mark not in ids[1:] for ids in theirs)


def test_wide_ids_are_int32_as_megatron_has_no_uint32(texts: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.tokenizers.byte_level.ByteTokenizer.vocab_size", 70_000)
    manifest = prepare_into(tmp_path / "out", text_config(texts))
    assert manifest.dtype == "int32"
    part = manifest.shards[0].train
    dataset = IndexedDataset(str(tmp_path / "out" / "train-00000"))
    assert dataset.index.dtype == np.int32
    assert dataset[0].tolist() == all_documents(open_directory(tmp_path / "out")[1]["train"])[0]
    assert part.binary is not None and part.binary.bytes == 4 * part.tokens


def test_a_shard_without_documents_of_a_split_has_no_file_for_it(texts: Path, tmp_path: Path) -> None:
    manifest = prepare_into(tmp_path / "out", text_config(texts), shard_megabytes=1e-6)
    assert len(manifest.shards) == 40
    for number, shard in enumerate(manifest.shards):
        for split in SPLITS:
            assert (tmp_path / "out" / f"{split}-{number:05d}.bin").exists() is bool(shard.part(split).documents)
        assert shard.train.documents + shard.held_out.documents == 1


def test_the_manifest_says_what_was_done_and_not_where(texts: Path, tmp_path: Path, bpe_file: Path) -> None:
    tokenizer = {"type": "huggingface", "path": str(bpe_file)}
    config = text_config(texts, tokenizer=tokenizer)
    manifest = prepare_into(tmp_path / "out", config, deduplicate=False)
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert str(tmp_path) not in text and str(bpe_file.parent) not in text
    raw = json.loads(text)
    assert raw["tokenizer"] == {"type": "huggingface", "path": "tokenizer.json", "boundary_token": "<|endoftext|>"}
    assert raw["source"] == {"type": "text_files", "pattern": "**/*.txt", "document_separator": None}
    assert (raw["held_out_fraction"], raw["deduplicate"], raw["shard_megabytes"]) == (0.2, False, 0.004)
    assert raw["tokenizer_fingerprint"] == open_tokenizer(config.tokenizer).fingerprint()
    for file in manifest.files():
        content = (tmp_path / "out" / file.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)


def test_memory_holds_what_a_directory_would(texts: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.preparation.reading.GROUP_BYTES", 1000)
    config = text_config(texts)
    for megabytes in (0.004, 1.0):
        manifest = prepare_into(tmp_path / f"{megabytes}", config, shard_megabytes=megabytes)
        options = Options(deduplicate=True, shard_megabytes=megabytes)
        memory = prepare_in_memory(config, open_tokenizer(config.tokenizer), options)
        _, directory = open_directory(tmp_path / f"{megabytes}")
        for split in SPLITS:
            assert all_documents(memory[split]) == all_documents(directory[split])
            assert memory[split].counts == directory[split].counts == manifest.counts(split)


class TestDuplicates:
    @pytest.fixture
    def repeated(self, texts: Path) -> Path:
        """40 documents, of which 3 are there again, one of them twice; and two empty ones."""
        for copy, original in (("z1", "0003"), ("z2", "0030"), ("z3", "0003"), ("a", "0007")):
            (texts / f"{copy}.txt").write_bytes((texts / f"{original}.txt").read_bytes())
        for name in ("e1", "e2"):
            (texts / f"{name}.txt").touch()
        return texts

    @pytest.mark.parametrize("group_bytes", [1, 700, 1 << 20])
    def test_the_first_of_equal_documents_is_kept(self, repeated: Path, tmp_path: Path, monkeypatch, group_bytes: int):
        monkeypatch.setattr("data.preparation.reading.GROUP_BYTES", group_bytes)
        manifest = prepare_into(tmp_path / "out", text_config(repeated))
        sizes = {path.stem: path.stat().st_size for path in repeated.iterdir()}
        assert manifest.duplicate_documents == 4
        assert manifest.duplicate_bytes == 2 * sizes["0003"] + sizes["0030"] + sizes["0007"]
        assert manifest.train.documents + manifest.held_out.documents == 40
        assert manifest.train.empty_documents + manifest.held_out.empty_documents == 2
        _, splits = open_directory(tmp_path / "out")
        stored = [ids for split in SPLITS for ids in all_documents(splits[split])]
        assert sorted(stored) == sorted([MARK, *(repeated / f"{n:04}.txt").read_bytes()] for n in range(40))

    def test_duplicates_may_be_kept_and_are_counted(self, repeated: Path, tmp_path: Path) -> None:
        manifest = prepare_into(tmp_path / "out", text_config(repeated), deduplicate=False)
        assert manifest.duplicate_documents == 4
        assert manifest.train.documents + manifest.held_out.documents == 44

    @given(st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=30))
    def test_digests_are_remembered_as_by_a_set(self, batches: list[list[int]]) -> None:
        seen, model = SeenDigests(), set()
        for batch in batches:
            expected = []
            for number in batch:
                expected.append(number in model)
                model.add(number)
            assert seen.add(digest_of(bytes([number])) for number in batch).tolist() == expected

    def test_a_digest_that_ends_with_zeros_is_its_own(self) -> None:
        seen = SeenDigests()
        assert seen.add([bytes(15) + b"\x01", bytes(16), b"\x01" + bytes(15)]).tolist() == [False] * 3
        assert seen.add([b"\x01" + bytes(15), b"\x01\x00\x01" + bytes(13)]).tolist() == [True, False]


class TestWorkers:
    @pytest.fixture(autouse=True)
    def small_groups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("data.preparation.encoding.INLINE_BYTES", 2000)
        monkeypatch.setattr("data.preparation.reading.GROUP_BYTES", 900)

    @pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
    def test_the_bytes_do_not_depend_on_how_many_work(
        self, texts: Path, tmp_path: Path, bpe_file: Path, sentencepiece_file: Path, kind: str
    ) -> None:
        path = bpe_file if kind == "huggingface" else sentencepiece_file
        config = text_config(texts, tokenizer={"type": kind, "path": str(path)})
        for workers in (0, 1, 2):
            prepare_into(tmp_path / f"{workers}", config, workers=workers)
        assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")

    def test_no_process_is_started_for_a_small_source(self, texts: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr("data.preparation.encoding.INLINE_BYTES", 1 << 20)
        monkeypatch.setattr("data.preparation.encoding.start_processes", None)
        prepare_into(tmp_path / "out", text_config(texts), workers=8)

    def test_a_killed_process_is_said_and_what_it_left_is_gone_on_with(self, texts: Path, tmp_path: Path) -> None:
        config = text_config(texts)

        def kill(state: PreparationState) -> None:
            for process in multiprocessing.active_children():
                process.kill()

        with pytest.raises(DataError, match="ended from outside, perhaps for want of memory.*finished shards are kept"):
            prepare_into(tmp_path / "out", config, workers=1, on_progress=kill)
        assert not list((tmp_path / "out").glob("*.partial-*"))
        prepare_into(tmp_path / "out", config)
        prepare_into(tmp_path / "again", config)
        assert contents(tmp_path / "out") == contents(tmp_path / "again")

    def test_what_a_process_refuses_is_said_here(self, texts: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr("data.tokenizers.byte_level.ByteTokenizer.fingerprint", lambda self: "changed")
        with pytest.raises(DataError, match="data.tokenizer was changed while it was being used"):
            prepare_into(tmp_path / "out", text_config(texts), workers=1)

    def test_few_groups_are_in_memory_at_once(self, texts: Path, tmp_path: Path, monkeypatch) -> None:
        read = finished = most = 0

        def encode(self, group):
            nonlocal read, most
            read += 1
            most = max(most, read - finished)
            return real(self, group)

        def count(state: PreparationState) -> None:
            nonlocal finished
            finished += 1

        from data.preparation.encoding import GroupEncoder

        real = GroupEncoder._begin
        monkeypatch.setattr(GroupEncoder, "_begin", encode)
        prepare_into(tmp_path / "out", text_config(texts), workers=2, on_progress=count)
        assert 1 < most <= 2 * 2 + 1


OTHERS = {
    "another tokenizer": ({"tokenizer": "bpe"}, {}, "another tokenizer"),
    "another fraction": ({"held_out_fraction": 0.3}, {}, "data.held_out_fraction=0.3 instead of 0.2"),
    "other shards": ({}, {"shard_megabytes": 0.005}, "shard-megabytes=0.005 instead of 0.004"),
    "duplicates": ({}, {"deduplicate": False}, "deduplicate=false instead of true"),
    "another pattern": ({"pattern": "*.txt"}, {}, r"data.source.pattern=\"\*.txt\" instead of \"\*\*/\*.txt\""),
    "another separator": ({"document_separator": "~"}, {}, 'data.source.document_separator="~" instead of null'),
    "other files": ({"path": "other"}, {}, "other files in data.source, or files that were changed since"),
}


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize("case", OTHERS)
def test_other_options_are_refused(texts: Path, tmp_path: Path, bpe_file: Path, state: str, case: str) -> None:
    settings, options, message = OTHERS[case]
    out = tmp_path / "out"
    if state == "finished":
        prepare_into(out, text_config(texts))
    else:
        break_off(out, texts)
    source = {"type": "text_files", "path": str(texts)}
    settings = dict(settings)
    for key in ("pattern", "document_separator", "path"):
        if key in settings:
            source[key] = settings.pop(key)
    if source["path"] == "other":
        source["path"] = str(write_texts(tmp_path / "other", seed=1))
    if settings.get("tokenizer") == "bpe":
        settings["tokenizer"] = {"type": "huggingface", "path": str(bpe_file)}
    before = contents(out)
    verb = "holds" if state == "finished" else "has begun with"
    with pytest.raises(DataError, match=f"out {verb} data from another preparation: now there is {message};.*delete"):
        prepare_into(out, data_config(source, **settings), **options)
    assert contents(out) | {".lock": b""} == before | {".lock": b""}


class BrokenOff(Exception):
    pass


def break_off(out: Path, texts: Path, shards: int = 2) -> None:
    """Begins to prepare, and ends when so many shards are done and another is begun."""

    def end(state: PreparationState) -> None:
        if len(list(out.glob("shard-*.json"))) == shards:
            raise BrokenOff

    with pytest.raises(BrokenOff):
        prepare_into(out, text_config(texts), on_progress=end)
    assert not list(out.glob("*.partial-*"))


def test_text_that_changed_unnoticed_by_its_files_is_noticed(texts: Path, tmp_path: Path) -> None:
    break_off(tmp_path / "out", texts)
    changed = texts / "0002.txt"
    status = changed.stat()
    changed.write_bytes(changed.read_bytes()[::-1])
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="no longer what .*out was begun with: other documents come where shard 0 was"):
        prepare_into(tmp_path / "out", text_config(texts))


def test_finished_shards_are_not_tokenized_again(texts: Path, tmp_path: Path, monkeypatch) -> None:
    break_off(tmp_path / "out", texts)
    import data.preparation.encoding as encoding

    tokenized = []
    real = encoding.encode_group

    def encode(group, *rest):
        tokenized.append(group.shard)
        return real(group, *rest)

    monkeypatch.setattr(encoding, "encode_group", encode)
    manifest = prepare_into(tmp_path / "out", text_config(texts))
    assert set(tokenized) == set(range(2, len(manifest.shards)))
    tokenized.clear()
    assert prepare_into(tmp_path / "out", text_config(texts)) == manifest
    assert tokenized == []


@pytest.mark.parametrize("damage", ["missing", "cut short", "record"])
def test_a_shard_that_is_no_longer_whole_is_done_again(texts: Path, tmp_path: Path, damage: str) -> None:
    break_off(tmp_path / "out", texts)
    binary, record = tmp_path / "out" / "train-00001.bin", tmp_path / "out" / "shard-00001.json"
    if damage == "missing":
        binary.unlink()
    elif damage == "cut short":
        binary.write_bytes(binary.read_bytes()[:-2])
    else:
        record.write_text(record.read_text()[:100])
    prepare_into(tmp_path / "out", text_config(texts))
    prepare_into(tmp_path / "whole", text_config(texts))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_directories_of_something_else_are_left_alone(texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="thesis holds other files .thesis.tex.; give a new directory"):
        prepare_into(other, text_config(texts))
    assert contents(other) == {"thesis.tex": b"precious"}
    with pytest.raises(DataError, match="thesis.tex is a file; give a new directory"):
        prepare_into(other / "thesis.tex", text_config(texts))
    break_off(tmp_path / "out", texts)
    (tmp_path / "out" / "unfinished.json").write_text("{}")
    with pytest.raises(DataError, match="unfinished.json is damaged or of another format version .*delete"):
        prepare_into(tmp_path / "out", text_config(texts))


def test_a_source_that_is_of_no_use_leaves_nothing(tmp_path: Path, bpe_file: Path) -> None:
    (tmp_path / "only.txt").write_text("the only document " * 20)
    tokenizer = {"type": "huggingface", "path": str(bpe_file)}
    config = text_config(tmp_path / "only.txt", held_out_fraction=0.02, tokenizer=tokenizer)
    with pytest.raises(DataError, match="none of the 1 documents .*above 0.0"):
        prepare_into(tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_records_that_were_left_out_are_counted(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {number} " * 9, "language": "en"}) for number in range(30)]
    lines += [json.dumps({"text": "kurz"}), "not json", json.dumps({"text": "un long texte", "language": "fr"})]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    source = {"type": "jsonl", "path": str(tmp_path / "corpus.jsonl"), "keep": {"language": ["en"]}}
    manifest = prepare_into(tmp_path / "out", data_config(source | {"bad_records": "skip"}))
    assert (manifest.filtered_records, manifest.skipped_records) == (2, 1)
    assert manifest.source["keep"] == {"language": ["en"]} and "path" not in manifest.source


def test_a_document_that_is_too_long_for_the_format(texts: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.preparation.encoding.LONGEST_SEQUENCE", 900)
    with pytest.raises(DataError, match="a document of data.source has .* tokens, but 899 is the most.*separator"):
        prepare_into(tmp_path / "out", text_config(texts))


@pytest.mark.parametrize("megabytes", [0.0, -1.0, float("inf"), float("nan")])
def test_shards_of_no_size(megabytes: float) -> None:
    with pytest.raises(DataError, match="shard-megabytes is"):
        Options(deduplicate=True, shard_megabytes=megabytes)
