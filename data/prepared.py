"""Prepared directories, read in place.

Opening one reads its manifest and the index of every shard; the ids stay in the files until a sample needs them. They
are read from the files rather than through memory maps: where a mapped file is cut short or its disk fails, the process
is killed without a word, while a read that fails can name the file. From the page cache that costs a microsecond or two
for each piece of a document.
"""

from __future__ import annotations

import bisect
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.config import PreparedSource
from data.documents import SPLITS, SplitCounts
from data.errors import DataError
from data.indexed_format import read_index
from data.preparation.manifest import FileRecord, Manifest, SplitPart, read_manifest
from data.source import Split
from data.tokenizers import Tokenizer

# Shards of a split that are kept open; the limit of a process is often 1024 files.
_OPEN_SHARDS = 256


class PreparedDocuments:
    """The documents of one split, over all its shards; may be pickled, and read by several threads at once."""

    def __init__(
        self,
        binaries: Sequence[Path],
        lengths: Sequence[np.ndarray],
        counts: SplitCounts,
        dtype: np.dtype,
        vocab_size: int,
        boundary_id: int,
    ) -> None:
        """
        Args:
            binaries: the ``.bin`` file of each shard.
            lengths: of the documents of each shard, (documents,) each.
            vocab_size: stored ids are below it.
        """
        self.counts = counts
        self.lengths: np.ndarray = np.concatenate([np.zeros(0, np.int64), *lengths])
        self._binaries = list(binaries)
        self._starts = np.cumsum(self.lengths) - self.lengths  # of each document, in tokens of the split
        ends = np.cumsum([0, *(int(part.sum(dtype=np.int64)) for part in lengths)])
        self._shard_starts: list[int] = ends[:-1].tolist()
        # Ids are read as if they had no sign: a negative one is then beyond any vocabulary.
        self.raw_type = np.dtype(np.uint16) if dtype == np.uint16 else np.dtype(np.uint32)
        self.id_limit, self._boundary_id = vocab_size, boundary_id
        self._open = functools.lru_cache(_OPEN_SHARDS)(self._opened)

    def read(self, document: int, first: int, out: np.ndarray) -> None:
        """Copies tokens ``first`` onwards of a document until ``out`` is full.

        Raises ``DataError``, which names the file, where it cannot be read or holds what no tokenizer wrote there.
        """
        ids = np.empty(len(out), dtype=self.raw_type)
        self.copy(document, first, ids)
        if len(ids) and ids.max() >= self.id_limit:
            self._refuse(document, first, ids)
        out[:] = ids

    def copy(self, document: int, first: int, out: np.ndarray) -> None:
        """The same, without a look at any id but a document's first, into ``out`` of type ``raw_type``."""
        start = int(self._starts[document]) + first
        shard = bisect.bisect_right(self._shard_starts, start) - 1
        self._fill(shard, start - self._shard_starts[shard], out)
        if not first and len(out) and out[0] != self._boundary_id:
            self._refuse(document, first, out)

    def _fill(self, shard: int, start: int, ids: np.ndarray) -> None:
        """Reads ids of a shard's file."""
        offset = start * self.raw_type.itemsize
        try:
            file = self._open(shard)
            count = os.preadv(file.descriptor, [ids], offset)
            # Linux reads no more than 2 GiB at once.
            while count < ids.nbytes:
                more = os.preadv(file.descriptor, [memoryview(ids).cast("B")[count:]], offset + count)
                if not more:
                    raise DataError(
                        f"{self._binaries[shard]} ends at byte {offset + count}, before the end of a document: it was"
                        " cut short since it was opened; copy it again, or prepare its directory anew."
                    )
                count += more
        except OSError as error:
            raise DataError(
                f"{self._binaries[shard]} cannot be read ({error.strerror}); check the file and its disk."
            ) from error

    def _refuse(self, document: int, first: int, ids: np.ndarray) -> None:
        shard = bisect.bisect_right(self._shard_starts, int(self._starts[document]) + first) - 1
        outside = ids[ids >= self.id_limit]
        what = f"the id {outside[0]}" if len(outside) else f"the id {ids[0]} where a document begins"
        raise DataError(
            f"{self._binaries[shard]} is damaged: its split's document {document} holds {what}, but ids are below"
            f" {self.id_limit} and documents begin with {self._boundary_id}; `pretrain data verify` says which files"
            " to copy or prepare again."
        )

    def _opened(self, shard: int) -> _OpenFile:
        return _OpenFile(self._binaries[shard])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = functools.lru_cache(_OPEN_SHARDS)(self._opened)


class _OpenFile:
    """A file that is closed when nobody reads it any more, so that forgetting it disturbs no other thread."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def open_directory(directory: Path) -> tuple[Manifest, dict[Split, PreparedDocuments]]:
    """A finished directory. Raises ``DataError`` when it is unfinished, or a file is missing or has another size."""
    manifest = read_manifest(directory)
    splits: dict[Split, PreparedDocuments] = {}
    for split in SPLITS:
        parts = [part for shard in manifest.shards if (part := shard.part(split)).binary is not None]
        splits[split] = PreparedDocuments(
            binaries=[directory / part.binary.name for part in parts],
            lengths=[_lengths(directory, part, manifest) for part in parts],
            counts=manifest.counts(split),
            dtype=manifest.token_type,
            vocab_size=manifest.stored_vocab_size,
            boundary_id=manifest.boundary_id,
        )
    return manifest, splits


def open_prepared(config: PreparedSource, tokenizer: Tokenizer) -> dict[Split, PreparedDocuments]:
    """A prepared directory for a run with this tokenizer.

    Raises ``DataError`` when it is unfinished or damaged, or another tokenizer wrote it.
    """
    directory = Path(config.path).expanduser()
    manifest, splits = open_directory(directory)
    if tokenizer.fingerprint() != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{directory} was prepared with another tokenizer (fingerprint {manifest.tokenizer_fingerprint[:24]}, with"
            f" {manifest.vocab_size} ids) than data.tokenizer ({tokenizer.fingerprint()[:24]}, with"
            f" {tokenizer.vocab_size}); set data.tokenizer to the one it was prepared with"
            f"{_where_it_is(directory, manifest)}, in the same version of its library, or prepare the text anew."
        )
    if (tokenizer.stored_vocab_size, tokenizer.boundary_id) != (manifest.stored_vocab_size, manifest.boundary_id):
        raise DataError(
            f"{directory} has ids below {manifest.stored_vocab_size}, the mark {manifest.boundary_id}, but"
            f" data.tokenizer has {tokenizer.stored_vocab_size} and {tokenizer.boundary_id}; prepare the text anew."
        )
    return splits


def _where_it_is(directory: Path, manifest: Manifest) -> str:
    return f", {directory / manifest.tokenizer_file.name}" if manifest.tokenizer_file else ""


def _lengths(directory: Path, part: SplitPart, manifest: Manifest) -> np.ndarray:
    """(documents,) int32: lengths of a shard's documents, after a look at the sizes of its files."""
    assert part.binary is not None and part.index is not None
    for file in (part.binary, part.index):
        check_size(directory, file)
    path = directory / part.index.name
    try:
        index = read_index(path)
        if index.dtype != manifest.token_type:
            raise ValueError(f"its ids are {index.dtype} instead of {manifest.dtype}")
        found = (len(index.sequence_lengths), len(index.document_bounds) - 1, index.tokens)
        if found != (part.documents, part.documents, part.tokens):
            raise ValueError(f"it has {found[1]} documents and {found[2]} tokens, not {part.documents}, {part.tokens}")
        if index.sequence_lengths.min() < 1:
            raise ValueError("a document has no token")
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); copy it again, or prepare {directory} anew.") from error
    return index.sequence_lengths


def check_size(directory: Path, file: FileRecord) -> None:
    """Raises ``DataError`` unless the file is there with its size."""
    path = directory / file.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}), but {directory} has it in its manifest; copy it again."
        ) from error
    if size != file.bytes:
        raise DataError(
            f"{path} has {size} bytes, but {file.bytes} when it was written: it was cut short or changed; copy it"
            f" again, or prepare {directory} anew."
        )
