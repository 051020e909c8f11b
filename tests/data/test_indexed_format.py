"""Our reader and writer of Megatron's index, against Megatron's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data.indexed_format import index_content, read_index


def build(prefix: Path, lengths: list[int], dtype: type, pieces: int = 1) -> Path:
    """Megatron's files of documents of these lengths; the path of their index."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for length in lengths:
        for piece in np.array_split(np.arange(length) % 100, pieces):
            builder.add_item(torch.from_numpy(piece))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_an_index_is_the_one_that_megatron_writes(tmp_path: Path, dtype: type) -> None:
    lengths = [5, 1, 70_000, 3]
    theirs = build(tmp_path / "corpus", lengths, dtype).read_bytes()
    assert index_content(np.dtype(dtype), np.array(lengths, dtype=np.int32)) == theirs


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("pieces", [1, 3])
def test_an_index_of_megatron_is_read(tmp_path: Path, dtype: type, pieces: int) -> None:
    index = read_index(build(tmp_path / "corpus", [5, 4, 9], dtype, pieces))
    assert index.dtype == np.dtype(dtype)
    assert np.diff(index.document_bounds).tolist() == [pieces] * 3
    assert (index.tokens, len(index.sequence_lengths), index.problem()) == (18, 3 * pieces, None)


def test_files_that_are_no_index(tmp_path: Path) -> None:
    path = tmp_path / "corpus.idx"
    with pytest.raises(ValueError, match="No such file"):
        read_index(path)
    whole = build(tmp_path / "corpus", [5, 4, 9], np.uint16).read_bytes()
    for damaged, message in (
        (b"", "ends after 0 bytes"),
        (b"another format" * 20, "does not begin as"),
        (whole[:9] + b"\x02" + whole[10:], "does not begin as"),
        (whole[:17] + b"\x06" + whole[18:], "does not begin as"),  # Megatron's code of float64
        (whole[:-1], "bytes, but .* by its own counts"),
        (whole[:18] + b"\xff" * 8 + whole[26:], "bytes, but .* by its own counts"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_index(path)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (34, -1, "sequence 0 has a negative length"),
        (34, 6, "sequence 1 does not start where the one before it ends"),
        (34 + 12, 2, "sequence 0 does not start"),
        (34 + 36, 1, "bounds are not the rising numbers"),
        (34 + 36 + 8, 3, "bounds are not the rising numbers"),
        (34 + 36 + 24, 2, "bounds are not the rising numbers"),
    ],
)
def test_an_index_that_contradicts_itself(tmp_path: Path, position: int, value: int, message: str) -> None:
    path = build(tmp_path / "corpus", [5, 4, 9], np.uint16)
    content = bytearray(path.read_bytes())
    size = 4 if position < 34 + 12 else 8
    content[position : position + size] = value.to_bytes(size, "little", signed=True)
    path.write_bytes(content)
    problem = read_index(path).problem()
    assert problem is not None and message in problem
