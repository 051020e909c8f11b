"""Megatron's indexed datasets: documents come back as written, with the mark in front."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data.config import DataConfig
from data.dataset import Data, open_data
from data.errors import DataError
from data.prepare import held_out

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
    bounds = documents.offsets.tolist()
    return [documents.tokens[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("ends", ["mark behind", "mark in front", "marks on both sides", "no mark"])
def test_round_trip(tmp_path: Path, dtype: type, pieces: int, ends: str) -> None:
    front = [MARK] if ends in ("mark in front", "marks on both sides") else []
    behind = [MARK] if ends in ("mark behind", "marks on both sides") else []
    prefix = build(tmp_path / "corpus", [[*front, *body, *behind] for body in BODIES], dtype, pieces)
    data = open_indexed(prefix)
    for split, wanted in (("train", False), ("held_out", True)):
        expected = [[MARK, *b] for i, b in enumerate(BODIES) if held_out(f"document/{i}", 0.1) is wanted]
        assert stored(data, split) == expected
        assert getattr(data.summary, split).counts.bytes == sum(len(b) - 1 for b in expected)


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
