"""Token ids in Megatron's indexed datasets (``.bin`` and ``.idx``), read in place.

Nothing is copied and nothing is read in full: the index says where documents lie, and the tokens stay in the memory
map until a sample needs them. What a full reading would tell (marks at the documents' ends, ids outside the
vocabulary) is looked at in every document of a small dataset and in many of a large one, and checked again as
documents are read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from data.config import MegatronIndexedSource
from data.documents import SplitCounts
from data.errors import DataError
from data.indexed_format import Index, read_index
from data.source import Split
from data.tokenizers import Tokenizer

# Datasets up to so many documents, or tokens, are looked at whole when they are opened.
_INSPECTED_DOCUMENTS = 1 << 16
_INSPECTED_TOKENS = 1 << 24
# Of larger files the fingerprint takes as many blocks of this size.
_FINGERPRINT_BLOCKS = 64
_BLOCK_BYTES = 1 << 16


class IndexedDocuments:
    """Some documents of one indexed dataset: the mark in front of each, whatever marks the dataset has itself."""

    def __init__(self, file: IndexedFile, chosen: np.ndarray, sha256: str) -> None:
        """``chosen``: numbers of documents of ``file``, (D,) int64; those without tokens are left out."""
        lengths = file.lengths[chosen]
        kept = lengths > 0
        self._file = file
        self._numbers = chosen[kept]
        self._starts = file.starts[self._numbers]
        self.raw_type, self.id_limit = file.raw.dtype, file.vocab_size
        self.lengths: np.ndarray = lengths[kept] + 1
        self.counts = SplitCounts(
            documents=len(self.lengths),
            tokens=int(self.lengths.sum()),
            bytes=None,
            empty_documents=int(len(chosen) - len(self.lengths)),
            invalid_utf8_documents=0,
            sha256=sha256,
        )

    def read(self, document: int, first: int, out: np.ndarray) -> None:
        """Copies tokens ``first`` onwards of a document, its mark being token 0, until ``out`` is full.

        Raises ``DataError`` for an id that the tokenizer does not have.
        """
        self.copy(document, first, out)
        if len(out) and not (0 <= out.min() and out.max() < self.id_limit):
            self._file.refuse_id(int(self._numbers[document]), out)

    def copy(self, document: int, first: int, out: np.ndarray) -> None:
        """The same, without a look at the ids, into ``out`` of type ``raw_type``."""
        start = self._starts.item(document)
        if first:
            start += first - 1
        else:
            out[:1] = self._file.mark
            out = out[1:]
        out[:] = self._file.raw[start : start + len(out)]
        if self._file.marks_behind_are_assumed:
            self._file.check_mark(int(self._numbers[document]), start + len(out))


class IndexedFile:
    """One ``.bin`` and its ``.idx``.

    ``lengths`` are the tokens of each document without marks at its ends, (D,) int64, 0 where there are none.
    """

    def __init__(self, prefix: str, tokenizer: Tokenizer) -> None:
        """Raises ``DataError`` for files that are missing, damaged, or of another tokenizer."""
        self.prefix, self.mark, self.vocab_size = prefix, tokenizer.boundary_id, tokenizer.stored_vocab_size
        for suffix in (".idx", ".bin"):
            if not Path(prefix + suffix).is_file():
                raise DataError(
                    f"{prefix}{suffix} does not exist; an indexed dataset is a .idx and a .bin file, named in the"
                    " config by their path without the ending."
                )
        index = open_index(prefix)
        dtype = index.dtype
        size = Path(prefix + ".bin").stat().st_size
        # A plain view of the map: slicing an np.memmap object itself is several times slower. No map is empty.
        self.tokens = np.asarray(np.memmap(prefix + ".bin", dtype=dtype, mode="r")) if size else np.zeros(0, dtype)
        # The same as if they had no sign: a negative id is then beyond any vocabulary.
        self.raw = self.tokens.view(f"u{dtype.itemsize}")
        bounds = np.asarray(index.document_bounds, dtype=np.int64)
        # Where each sequence starts, in tokens, and where the last one ends.
        starts = np.append(index.sequence_pointers // dtype.itemsize, len(self.tokens))
        self.starts = starts[bounds[:-1]]
        self.lengths = starts[bounds[1:]] - self.starts
        self._strip_marks()
        if len(self.tokens) <= _INSPECTED_TOKENS:
            self._check_every_id()

    def check_mark(self, document: int, end: int) -> None:
        """Raises ``DataError`` where a document ends in front of the file's token ``end`` and that is no mark."""
        if end == self.starts[document] + self.lengths[document] and self.tokens[end] != self.mark:
            raise DataError(
                f"{self.prefix}.bin document {document} does not end with the boundary mark {self.mark}, although the"
                f" {_INSPECTED_DOCUMENTS:,} documents that were looked at do; write the dataset again, with a mark"
                " behind every document or behind none."
            )

    def _strip_marks(self) -> None:
        """Leaves out marks at the ends of documents.

        Datasets end documents with the mark, start them with it, or have none; all come out the same. A mark in the
        middle stays: it starts a new document there.
        """
        count = len(self.lengths)
        everything = count <= _INSPECTED_DOCUMENTS
        looked_at = np.arange(count) if everything else np.linspace(0, count - 1, _INSPECTED_DOCUMENTS).astype(np.int64)
        looked_at = looked_at[self.lengths[looked_at] > 0]
        behind = self.tokens[self.starts[looked_at] + self.lengths[looked_at] - 1] == self.mark
        left = self.lengths[looked_at] - behind
        front = (left > 0) & (self.tokens[self.starts[looked_at]] == self.mark)
        self.marks_behind_are_assumed = not everything and bool(behind.all())
        if everything:
            self.lengths[looked_at] = left - front
            self.starts[looked_at] += front
            return
        for where, found in (("behind", behind), ("in front of", front)):
            if found.any() and not found.all():
                raise DataError(
                    f"{self.prefix}.bin has a boundary mark ({self.mark}) {where} some documents, such as number"
                    f" {looked_at[found][0]}, but not others, such as number {looked_at[~found][0]}; write the dataset"
                    " again in one form."
                )
        self.lengths = np.maximum(self.lengths - int(behind.all()) - int(front.all()), 0)
        self.starts += int(front.all())

    def _check_every_id(self) -> None:
        outside = (self.tokens < 0) | (self.tokens >= self.vocab_size)
        if outside.any():
            position = int(outside.argmax())
            document = int(np.searchsorted(self.starts, position, side="right")) - 1
            self.refuse_id(max(document, 0), self.tokens[position : position + 1])

    def refuse_id(self, document: int, ids: np.ndarray) -> None:
        """Raises ``DataError`` for the first of ``ids`` that the tokenizer does not have."""
        outside = int(ids[(ids < 0) | (ids >= self.vocab_size)][0])
        raise DataError(
            f"{self.prefix}.bin document {document} holds the id {outside}, but the tokenizer has the ids 0 to"
            f" {self.vocab_size - 1}; set data.tokenizer to the tokenizer that wrote this dataset."
        )

    def fingerprint(self) -> str:
        """Hash of both files' sizes and of blocks spread over them; of small files it takes everything."""
        digest = hashlib.sha256(f"{self.mark} {self.vocab_size}".encode())
        for suffix in (".idx", ".bin"):
            path = Path(self.prefix + suffix)
            size = path.stat().st_size
            digest.update(f"{suffix} {size}".encode())
            with path.open("rb") as file:
                last = max(size - _BLOCK_BYTES, 0)
                if last // _BLOCK_BYTES < _FINGERPRINT_BLOCKS:
                    digest.update(file.read())
                    continue
                for block in range(_FINGERPRINT_BLOCKS):
                    file.seek(last * block // (_FINGERPRINT_BLOCKS - 1))
                    digest.update(file.read(_BLOCK_BYTES))
        return digest.hexdigest()


def open_indexed(
    config: MegatronIndexedSource, tokenizer: Tokenizer, held_out_fraction: float
) -> dict[Split, IndexedDocuments]:
    """Both splits of an indexed dataset, or of two. Raises ``DataError`` for files that do not fit."""
    file = IndexedFile(config.path_prefix, tokenizer)
    everything = np.arange(len(file.lengths))
    sha256 = file.fingerprint()
    if config.held_out_path_prefix is not None:
        other = IndexedFile(config.held_out_path_prefix, tokenizer)
        splits: dict[Split, IndexedDocuments] = {
            "train": IndexedDocuments(file, everything, sha256),
            "held_out": IndexedDocuments(other, np.arange(len(other.lengths)), other.fingerprint()),
        }
    else:
        held_out = document_positions(len(everything)) < held_out_fraction
        splits = {
            split: IndexedDocuments(file, everything[chosen], f"{split} {held_out_fraction} of {sha256}")
            for split, chosen in (("train", ~held_out), ("held_out", held_out))
        }
    for split, documents in splits.items():
        if not len(documents.lengths):
            prefix = config.held_out_path_prefix if split == "held_out" else None
            raise DataError(
                f"{prefix or config.path_prefix}.bin gives the {split.replace('_', '-')} split no document with any"
                f" token, at data.held_out_fraction {held_out_fraction} of {len(everything)} documents; change the"
                " fraction, give more documents, or name a dataset of its own in held_out_path_prefix."
            )
    return splits


def document_positions(count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): a hash of each document's number, which decides its split.

    The finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators").
    """
    number = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((number ^ (number >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53


def open_index(prefix: str) -> Index:
    """The index of ``prefix``. Raises ``DataError`` for a damaged index or a ``.bin`` of another size."""
    try:
        index = read_index(Path(prefix + ".idx"))
    except ValueError as error:
        raise DataError(
            f"{prefix}.idx and {prefix}.bin cannot be opened as an indexed dataset ({error}); write them again."
        ) from error
    problem = index.problem()
    if problem is not None:
        raise DataError(f"{prefix}.idx is damaged: {problem}; write the pair again.")
    expected = index.tokens * index.dtype.itemsize
    actual = Path(prefix + ".bin").stat().st_size
    if actual != expected:
        raise DataError(f"{prefix}.bin has {actual} bytes but its index says {expected}; copy or write the pair again.")
    return index
