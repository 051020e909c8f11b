"""Megatron's indexed datasets: documents come back as written, with the mark in front, and nothing is copied."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data.config import DataConfig
from data.dataset import Data, open_data
from data.errors import DataError
from data.indexed import IndexedFile, document_positions
from data.tokenizers.byte_level import ByteTokenizer

MARK = 256
BODIES = [[number % 256, *range(number % 50), 7] for number in range(120)]


def build(prefix: Path, documents: list[list[int]], dtype: type = np.int32, pieces: int = 1) -> Path:
    """Writes ``documents``, each as ``pieces`` sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        for piece in np.array_split(np.array(ids, dtype=np.int64), pieces):
            builder.add_item(torch.from_numpy(piece))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def open_indexed(prefix: Path, held_out_prefix: Path | None = None) -> Data:
    source = {"type": "megatron_indexed", "path_prefix": str(prefix)}
    if held_out_prefix is not None:
        source["held_out_path_prefix"] = str(held_out_prefix)
    settings = {"source": source, "tokenizer": {"type": "bytes"}, "sequence_length": 16}
    return open_data(DataConfig.model_validate(settings | {"held_out_fraction": 0.1}), seed=0)


def stored(data: Data, split: str) -> list[list[int]]:
    documents = getattr(data, split).documents
    whole = []
    for number, length in enumerate(documents.lengths.tolist()):
        out = np.empty(length, dtype=np.int64)
        documents.read(number, 0, out)
        whole.append(out.tolist())
    return whole


def held_out_numbers(count: int, fraction: float = 0.1) -> set[int]:
    return set(np.flatnonzero(document_positions(count) < fraction).tolist())


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("ends", ["mark behind", "mark in front", "marks on both sides", "no mark"])
def test_round_trip(tmp_path: Path, dtype: type, pieces: int, ends: str) -> None:
    front = [MARK] if ends in ("mark in front", "marks on both sides") else []
    behind = [MARK] if ends in ("mark behind", "marks on both sides") else []
    prefix = build(tmp_path / "corpus", [[*front, *body, *behind] for body in BODIES], dtype, pieces)
    data = open_indexed(prefix)
    chosen = held_out_numbers(len(BODIES))
    assert 0 < len(chosen) < len(BODIES) / 4
    for split, wanted in (("train", False), ("held_out", True)):
        expected = [[MARK, *b] for i, b in enumerate(BODIES) if (i in chosen) is wanted]
        assert stored(data, split) == expected
        counts = getattr(data.summary, split).counts
        assert (counts.documents, counts.tokens) == (len(expected), sum(map(len, expected)))


def test_pieces_of_documents_are_parts_of_the_whole(tmp_path: Path) -> None:
    documents = open_indexed(build(tmp_path / "corpus", [[*body, MARK] for body in BODIES])).train.documents
    for number, length in enumerate(documents.lengths.tolist()):
        whole = np.empty(length, dtype=np.int64)
        documents.read(number, 0, whole)
        for first, size in ((0, 0), (0, 1), (1, length - 1), (length - 1, 1), (length // 2, length - length // 2)):
            out = np.empty(size, dtype=np.int64)
            documents.read(number, first, out)
            assert out.tolist() == whole[first : first + size].tolist()


def test_the_split_of_a_document_does_not_depend_on_how_many_there_are() -> None:
    few, many = document_positions(1000), document_positions(100_000)
    assert np.array_equal(few, many[:1000])
    assert many.min() >= 0 and many.max() < 1
    # Of 100,000 uniform numbers a tenth, give or take four standard deviations.
    assert abs(int((many < 0.1).sum()) - 10_000) < 4 * np.sqrt(9_000)


def test_tokens_stay_in_the_file(tmp_path: Path) -> None:
    documents = open_indexed(build(tmp_path / "corpus", BODIES)).train.documents
    base = documents._file.tokens
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)


class TestLargeDataset:
    """Of a dataset too large to be looked at whole, samples decide, and reading finds what they missed."""

    @pytest.fixture(autouse=True)
    def small_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("data.indexed._INSPECTED_DOCUMENTS", 60)
        monkeypatch.setattr("data.indexed._INSPECTED_TOKENS", 10)

    @pytest.mark.parametrize("ends", [([], []), ([], [MARK]), ([MARK], []), ([MARK], [MARK])])
    def test_uniform_marks(self, tmp_path: Path, ends: tuple[list[int], list[int]]) -> None:
        front, behind = ends
        data = open_indexed(build(tmp_path / "corpus", [[*front, *body, *behind] for body in BODIES]))
        chosen = held_out_numbers(len(BODIES))
        assert stored(data, "train") == [[MARK, *b] for i, b in enumerate(BODIES) if i not in chosen]

    def test_mixed_marks_are_refused(self, tmp_path: Path) -> None:
        mixed = [[*body, MARK] if number % 2 else body for number, body in enumerate(BODIES)]
        with pytest.raises(DataError, match="has a boundary mark .256. behind some documents, such as number"):
            open_indexed(build(tmp_path / "corpus", mixed))

    def test_a_missing_mark_is_found_when_its_document_is_read(self, tmp_path: Path) -> None:
        looked_at = set(np.linspace(0, len(BODIES) - 1, 60).astype(int).tolist())
        odd = next(n for n in range(len(BODIES)) if n not in looked_at | held_out_numbers(len(BODIES)))
        mixed = [body if number == odd else [*body, MARK] for number, body in enumerate(BODIES)]
        data = open_indexed(build(tmp_path / "corpus", mixed))
        with pytest.raises(DataError, match=f"document {odd} does not end with the boundary mark 256"):
            stored(data, "train")

    def test_an_id_beyond_the_vocabulary_is_found_when_it_is_read(self, tmp_path: Path) -> None:
        wrong = next(n for n in range(len(BODIES)) if n not in held_out_numbers(len(BODIES)))
        documents = [[*body, 300, 1] if number == wrong else body for number, body in enumerate(BODIES)]
        data = open_indexed(build(tmp_path / "corpus", documents))
        with pytest.raises(DataError, match=f"corpus.bin document {wrong} holds the id 300.*ids 0 to 256"):
            stored(data, "train")


def test_the_fingerprint_names_the_content(tmp_path: Path) -> None:
    first = open_indexed(build(tmp_path / "first", BODIES)).fingerprint
    assert open_indexed(build(tmp_path / "second", BODIES)).fingerprint == first
    assert open_indexed(build(tmp_path / "third", [*BODIES[:-1], [5, *BODIES[-1][1:]]])).fingerprint != first


def test_the_fingerprint_of_large_files_takes_blocks_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.indexed._BLOCK_BYTES", 8)
    tokenizer = ByteTokenizer()
    prefix = build(tmp_path / "corpus", BODIES)
    before = IndexedFile(str(prefix), tokenizer).fingerprint()
    assert IndexedFile(str(prefix), tokenizer).fingerprint() == before
    binary = Path(f"{prefix}.bin")
    content = bytearray(binary.read_bytes())
    assert len(content) > 8 * 64
    content[-4] ^= 1
    binary.write_bytes(content)
    assert IndexedFile(str(prefix), tokenizer).fingerprint() != before


def test_no_document_for_a_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gives the held-out split no document with any token.*of 1 documents"):
        open_indexed(build(tmp_path / "corpus", BODIES[:1]))
    with pytest.raises(DataError, match="validation.bin gives the held-out split no document"):
        open_indexed(build(tmp_path / "train", BODIES), build(tmp_path / "validation", [[MARK]]))


def test_a_mark_inside_a_document_starts_another(tmp_path: Path) -> None:
    inside = [[1, 2, MARK, 3, 4, MARK] for _ in range(100)]
    data = open_indexed(build(tmp_path / "corpus", inside))
    assert stored(data, "train")[0] == [MARK, 1, 2, MARK, 3, 4]
    batch = data.train.batch([0])
    # No state is carried over, so the first token starts a document whatever it is.
    starts = [position == 0 or token == MARK for position, token in enumerate(batch.tokens[0].tolist())]
    assert batch.document_starts[0].tolist() == starts and sum(starts) > 4


def test_a_held_out_dataset_of_its_own(tmp_path: Path) -> None:
    train = build(tmp_path / "train", BODIES)
    other = build(tmp_path / "validation", [[9] * 30, [8] * 30])
    data = open_indexed(train, other)
    assert stored(data, "train") == [[MARK, *body] for body in BODIES]
    assert stored(data, "held_out") == [[MARK, *[9] * 30], [MARK, *[8] * 30]]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    data = open_indexed(build(tmp_path / "corpus", [*BODIES, [], [MARK], [MARK, MARK]]))
    counts = (data.summary.train.counts, data.summary.held_out.counts)
    assert (sum(c.documents for c in counts), sum(c.empty_documents for c in counts)) == (len(BODIES), 3)


@pytest.mark.parametrize("outside", [257, -1])
def test_ids_beyond_the_vocabulary(tmp_path: Path, outside: int) -> None:
    prefix = build(tmp_path / "corpus", [*BODIES, [1, outside, 2]])
    with pytest.raises(DataError, match=f"corpus.bin document 120 holds the id {outside}.*ids 0 to 256"):
        open_indexed(prefix)


# Megatron's reader complains in __del__ when its constructor failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none.idx does not exist; an indexed dataset is"):
        open_indexed(tmp_path / "none")
    prefix = build(tmp_path / "corpus", BODIES)
    binary, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    ids, header = binary.read_bytes(), index.read_bytes()
    binary.write_bytes(ids[:-4])
    with pytest.raises(DataError, match=f"has {len(ids) - 4} bytes but its index says {len(ids)}"):
        open_indexed(prefix)
    binary.write_bytes(ids)
    for damaged in (b"", b"not an index", header[:40]):
        index.write_bytes(damaged)
        with pytest.raises(DataError, match="corpus.idx and .*corpus.bin cannot be opened"):
            open_indexed(prefix)
    binary.unlink()
    with pytest.raises(DataError, match="corpus.bin does not exist"):
        open_indexed(prefix)
