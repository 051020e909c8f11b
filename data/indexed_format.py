"""The index of Megatron's indexed format: what an ``.idx`` file says of the token ids in the ``.bin`` file beside it.

The layout is Megatron-core's (``megatron.core.datasets.indexed_dataset``): nine bytes that name the format, the version
(uint64), a code of the ids' type (uint8), the number of sequences S and of document bounds D + 1 (uint64 each), then
lengths in tokens (S int32), pointers in bytes (S int64) and document bounds as numbers of sequences (D + 1 int64), all
little-endian. It is read and written here because Megatron's own classes need torch, and walk over every document in
Python when they write.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAME = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")

# Megatron's code of each type that an id may have.
_CODES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}

# Lengths are int32.
LONGEST_SEQUENCE = 2**31 - 1


@dataclass(frozen=True)
class Index:
    """What an ``.idx`` file says.

    ``document_bounds[d] : document_bounds[d + 1]`` are the sequences of document d.
    """

    dtype: np.dtype
    sequence_lengths: np.ndarray  # (S,) int32, in tokens
    sequence_pointers: np.ndarray  # (S,) int64, in bytes from the start of the .bin
    document_bounds: np.ndarray  # (D + 1,) int64

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.sequence_lengths.sum(dtype=np.int64))

    def problem(self) -> str | None:
        """What contradicts itself in the index, in words; None where nothing does."""
        if (self.sequence_lengths < 0).any():
            return f"sequence {int((self.sequence_lengths < 0).argmax())} has a negative length"
        ends = np.cumsum(self.sequence_lengths, dtype=np.int64) * self.dtype.itemsize
        starts = ends - self.sequence_lengths.astype(np.int64) * self.dtype.itemsize
        wrong = self.sequence_pointers != starts
        if wrong.any():
            return f"sequence {int(wrong.argmax())} does not start where the one before it ends"
        bounds = self.document_bounds
        if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(starts) or (np.diff(bounds) < 0).any():
            return "the documents' bounds are not the rising numbers of its sequences"
        return None


def read_index(path: Path) -> Index:
    """Memory-maps an ``.idx`` file. What it says is not examined; see ``Index.problem``.

    Raises:
        ValueError: the file is missing, cut short, or of another format; says which, without the file's name.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise ValueError(f"it ends after {len(header)} bytes")
        name, version, code, sequences, bounds = _HEADER.unpack(header)
        if name != NAME or version != VERSION or code not in _CODES:
            raise ValueError("it does not begin as such an index does")
        content = np.memmap(path, mode="r")
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    needed = _HEADER.size + 12 * sequences + 8 * bounds
    # Other writers may append the modes of multimodal sequences, one byte each.
    if len(content) not in (needed, needed + sequences):
        raise ValueError(f"it has {len(content)} bytes, but {needed} by its own counts")
    at = _HEADER.size
    plain = np.asarray(content)  # slicing an np.memmap object itself is several times slower
    return Index(
        dtype=_CODES[code],
        sequence_lengths=plain[at : at + 4 * sequences].view("<i4"),
        sequence_pointers=plain[at + 4 * sequences : at + 12 * sequences].view("<i8"),
        document_bounds=plain[at + 12 * sequences : at + 12 * sequences + 8 * bounds].view("<i8"),
    )


def index_content(dtype: np.dtype, lengths: np.ndarray) -> bytes:
    """The ``.idx`` file of documents of ``lengths`` tokens each ((D,) int32), every one a single sequence."""
    code = next(code for code, known in _CODES.items() if known == dtype)
    pointers = np.cumsum(lengths, dtype=np.int64) - lengths
    return b"".join(
        (
            _HEADER.pack(NAME, VERSION, code, len(lengths), len(lengths) + 1),
            lengths.astype("<i4").tobytes(),
            (pointers * dtype.itemsize).astype("<i8").tobytes(),
            np.arange(len(lengths) + 1, dtype="<i8").tobytes(),
        )
    )
