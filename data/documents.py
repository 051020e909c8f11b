"""The stored form of tokenized documents: per split one flat array of ids and where each document starts.

A document is stored as the boundary mark, then its tokens. A prepared directory holds, per split, the ids
(``*_tokens.bin``) and the starts (``*_offsets.npy``), and ``metadata.json``.
"""

from __future__ import annotations

import functools
import hashlib
import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from data.errors import DataError
from data.sources import Split
from data.tokenizers import Tokenizer

SPLITS: tuple[Split, Split] = ("train", "held_out")


@dataclass(frozen=True)
class SplitCounts:
    """What a split holds. ``tokens`` counts the marks."""

    documents: int
    tokens: int
    bytes: int | None  # of the raw documents; None where the tokens are read in place, which nobody has counted
    empty_documents: int  # left out, not in ``documents``
    invalid_utf8_documents: int  # with U+FFFD in place of bad bytes; only where the tokenizer reads text
    sha256: str  # names the content: of the token ids as stored, or of samples of files that are read in place


class StoredDocuments(Protocol):
    """The tokenized documents of one split, wherever they lie. Token 0 of each is the boundary mark."""

    counts: SplitCounts
    lengths: np.ndarray  # (number of documents,) int64, the mark counted

    def read(self, document: int, first: int, out: np.ndarray) -> None:
        """Copies tokens ``first`` onwards of a document until ``out`` is full; there are at least so many."""


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents one behind the other: ``tokens[offsets[d] : offsets[d + 1]]`` is document d, mark first."""

    tokens: np.ndarray  # (number of tokens,) uint16 or uint32
    offsets: np.ndarray  # (number of documents + 1,) int64
    counts: SplitCounts

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(number of documents,) int64."""
        return np.diff(self.offsets)

    def read(self, document: int, first: int, out: np.ndarray) -> None:
        """Copies tokens ``first`` onwards of a document until ``out`` is full."""
        start = int(self.offsets[document]) + first
        out[:] = self.tokens[start : start + len(out)]


def read_stream(documents: StoredDocuments, limit: int) -> np.ndarray:
    """(min(limit, all tokens),) int64: documents in their stored order, up to ``limit`` tokens."""
    stream = np.empty(min(limit, documents.counts.tokens), dtype=np.int64)
    position = 0
    for document, length in enumerate(documents.lengths.tolist()):
        if position == len(stream):
            break
        end = min(position + length, len(stream))
        documents.read(document, 0, stream[position:end])
        position = end
    return stream


def token_dtype(stored_vocab_size: int) -> np.dtype:
    """The narrowest stored type that holds every id."""
    return np.dtype(np.uint16 if stored_vocab_size <= 1 << 16 else np.uint32)


def open_prepared(directory: Path) -> dict[Split, TokenizedDocuments]:
    """Memory-maps a prepared directory. Raises ``DataError`` when a file is missing or has another size."""
    prepared: dict[Split, TokenizedDocuments] = {}
    try:
        metadata = json.loads((directory / "metadata.json").read_text())
        dtype = np.dtype(metadata["dtype"])
        for split in SPLITS:
            counts = SplitCounts(**metadata[split])
            # A plain view of the map: slicing an np.memmap object itself is several times slower.
            tokens = np.asarray(np.memmap(directory / f"{split}_tokens.bin", dtype=dtype, mode="r"))
            offsets = np.load(directory / f"{split}_offsets.npy")
            sizes = (len(tokens), int(offsets[-1]), len(offsets) - 1)
            if sizes != (counts.tokens, counts.tokens, counts.documents):
                raise ValueError(f"{split} has {len(tokens)} tokens, but its metadata says {counts.tokens}")
            prepared[split] = TokenizedDocuments(tokens, offsets, counts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the prepared data in {directory} is damaged ({error}); delete that directory and start again."
        ) from error
    return prepared


def verify_prepared(directory: Path) -> dict[Split, SplitCounts]:
    """Reads a prepared directory in full and compares the checksums. Raises ``DataError`` on a difference."""
    prepared = open_prepared(directory)
    for split, documents in prepared.items():
        if hashlib.sha256(documents.tokens).hexdigest() != documents.counts.sha256:
            raise DataError(
                f"{directory / f'{split}_tokens.bin'} has changed since it was written (its SHA-256 differs);"
                " delete that directory and start again."
            )
    return {split: documents.counts for split, documents in prepared.items()}


class SplitWriter:
    """Appends documents to a file, counting and hashing what it writes."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer) -> None:
        self.file = file
        self.dtype = token_dtype(tokenizer.stored_vocab_size)
        self.mark = np.array([tokenizer.boundary_id], dtype=self.dtype).tobytes()
        self.offsets = array("q", [0])  # a list would take several times the memory
        self.raw_bytes = self.empty = self.invalid_utf8 = 0
        self.digest = hashlib.sha256()

    def add(self, ids: np.ndarray, raw_bytes: int, valid_utf8: bool = True) -> None:
        """Appends the mark and ``ids``; a document without ids is counted and left out."""
        if ids.size == 0:
            self.empty += 1
            return
        for piece in (self.mark, ids.astype(self.dtype, copy=False).tobytes()):
            self.file.write(piece)
            self.digest.update(piece)
        self.offsets.append(self.offsets[-1] + 1 + ids.size)
        self.raw_bytes += raw_bytes
        self.invalid_utf8 += not valid_utf8

    def counts(self) -> SplitCounts:
        return SplitCounts(
            documents=len(self.offsets) - 1,
            tokens=self.offsets[-1],
            bytes=self.raw_bytes,
            empty_documents=self.empty,
            invalid_utf8_documents=self.invalid_utf8,
            sha256=self.digest.hexdigest(),
        )
