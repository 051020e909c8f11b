"""The stored form of tokenized documents: ids one document behind the other, the boundary mark in front of each."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data.source import Split

SPLITS: tuple[Split, Split] = ("train", "held_out")


@dataclass(frozen=True)
class SplitCounts:
    """What a split holds. ``tokens`` counts the marks."""

    documents: int
    tokens: int
    bytes: int | None  # of the raw documents; None where the tokens are read in place, which nobody has counted
    empty_documents: int  # left out, not in ``documents``
    invalid_utf8_documents: int  # with U+FFFD in place of bad bytes; only where the tokenizer reads text
    sha256: str  # names the content: by the token ids as stored, or by samples of files that others wrote


class StoredDocuments(Protocol):
    """The tokenized documents of one split, wherever they lie. Token 0 of each is the boundary mark."""

    counts: SplitCounts
    lengths: np.ndarray  # (number of documents,) int64, the mark counted
    raw_type: np.dtype  # of ids as they are stored, read as if they had no sign
    id_limit: int  # ids as they are stored should be below it

    def read(self, document: int, first: int, out: np.ndarray) -> None:
        """Copies tokens ``first`` onwards of a document until ``out``, of any type, is full; there are so many.

        Raises ``DataError``, which names file and document, for an id that no tokenizer wrote there.
        """

    def copy(self, document: int, first: int, out: np.ndarray) -> None:
        """The same, without a look at the ids, into ``out`` of type ``raw_type``."""


# Part of a document and where it goes: document, its first token, and from where to where in a buffer.
Piece = tuple[int, int, int, int]


def read_pieces(documents: StoredDocuments | DocumentArrays, pieces: Sequence[Piece], raw: np.ndarray) -> None:
    """Copies many pieces into the flat buffer ``raw`` of ``documents.raw_type``, whose ids are looked at once.

    Raises what ``documents.read`` does. The rest of ``raw`` must hold ids below ``documents.id_limit``.
    """
    copy = documents.copy
    for document, first, start, end in pieces:
        copy(document, first, raw[start:end])
    if raw.size and raw.max() >= documents.id_limit:
        for document, first, start, end in pieces:
            documents.read(document, first, raw[start:end])


@dataclass(frozen=True)
class DocumentArrays:
    """Documents in memory, one behind the other: ``tokens[offsets[d] : offsets[d + 1]]`` is document d, mark first."""

    tokens: np.ndarray  # (number of tokens,) of any integer type
    offsets: np.ndarray  # (number of documents + 1,) int64

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(number of documents,) int64."""
        return np.diff(self.offsets)

    @property
    def raw_type(self) -> np.dtype:
        """Of the ids, as if they had no sign."""
        return np.dtype(f"u{self.tokens.dtype.itemsize}")

    @property
    def id_limit(self) -> int:
        """Beyond every id: they came from the tokenizer itself."""
        return 1 << 8 * self.tokens.dtype.itemsize

    def read(self, document: int, first: int, out: np.ndarray) -> None:
        """Copies tokens ``first`` onwards of a document until ``out`` is full."""
        start = int(self.offsets[document]) + first
        out[:] = self.tokens[start : start + len(out)]

    copy = read


@dataclass(frozen=True)
class TokenizedDocuments(DocumentArrays):
    """All documents of a split, counted."""

    counts: SplitCounts


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
    """The narrowest type of Megatron's indexed format that holds every stored id below ``stored_vocab_size``."""
    return np.dtype(np.uint16 if stored_vocab_size <= 1 << 16 else np.int32)


def content_fingerprint(checksums: Sequence[str]) -> str:
    """Names the content of a split: from the SHA-256 of the ids of each of its shards, which is its own for one."""
    if len(checksums) == 1:
        return checksums[0]
    return hashlib.sha256(json.dumps(list(checksums)).encode()).hexdigest()
