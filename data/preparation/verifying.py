"""Reads prepared data in full and says what is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.documents import SPLITS
from data.errors import DataError
from data.indexed_format import Index, read_index
from data.preparation.manifest import (
    MANIFEST_FILE,
    PLAN_FILE,
    FileRecord,
    Manifest,
    SplitPart,
    read_manifest,
    why_no_manifest,
)

_CHUNK_BYTES = 16 << 20

OnBytes = Callable[[int], None]


@dataclass
class Verification:
    """What was read, and what is wrong: sentences that begin with the file."""

    files: int = 0
    bytes: int = 0
    documents: int = 0
    tokens: int = 0
    has_checksums: bool = True
    problems: list[str] = field(default_factory=list)

    def add_bytes(self, size: int, on_bytes: OnBytes) -> None:
        """Counts bytes that were read."""
        self.bytes += size
        on_bytes(size)


def prepared_directories(path: Path) -> list[Path]:
    """``path`` itself where it is a prepared directory, or the sources of a mixture that was prepared into it."""
    if any((path / name).is_file() for name in (MANIFEST_FILE, PLAN_FILE)):
        return [path]
    found = {file.parent for name in (MANIFEST_FILE, PLAN_FILE) for file in path.glob(f"*/{name}")}
    return sorted(found)


def total_bytes(path: Path) -> int:
    """Bytes that verifying ``path`` will read, as far as sizes tell."""
    directories = prepared_directories(path)
    prefix = _prefix(path)
    files = [file for directory in directories for file in directory.iterdir()] if directories else []
    if not directories and prefix is not None:
        files = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
    return sum(file.stat().st_size for file in files if file.is_file())


def verify(path: Path, on_bytes: OnBytes = lambda size: None) -> Verification:
    """Checks a prepared directory, several below one directory, or the prefix of an indexed dataset of someone else.

    Of a prepared directory every file is compared with the manifest's sizes and checksums, every index with itself and
    with the ids, and every id with the vocabulary; of an indexed dataset only the structure.

    Raises ``DataError`` for what is no such data, or is unfinished.
    """
    found = Verification()
    directories = prepared_directories(path)
    if directories:
        for directory in directories:
            if not (directory / MANIFEST_FILE).is_file():
                raise DataError(why_no_manifest(directory))
            _verify_directory(directory, found, on_bytes)
        return found
    prefix = _prefix(path)
    if prefix is None:
        raise DataError(
            f"{why_no_manifest(path)} Nor is it the path of an indexed dataset without the ending: {path}.idx does not"
            " exist."
        )
    _verify_indexed(prefix, found, on_bytes)
    return found


def _prefix(path: Path) -> str | None:
    """The path of an indexed dataset without its ending, from the path with or without it."""
    for prefix in (str(path), str(path.with_suffix("")) if path.suffix in (".idx", ".bin") else str(path)):
        if Path(f"{prefix}.idx").is_file() or Path(f"{prefix}.bin").is_file():
            return prefix
    return None


def _verify_directory(directory: Path, found: Verification, on_bytes: OnBytes) -> None:
    try:
        manifest = read_manifest(directory)
    except DataError as error:
        found.problems.append(str(error))
        return
    found.files += 1
    if manifest.tokenizer_file is not None:
        _compare(directory, manifest.tokenizer_file, found, on_bytes)
    for shard in manifest.shards:
        for split in SPLITS:
            _verify_part(directory, shard.part(split), manifest, found, on_bytes)


def _verify_part(directory: Path, part: SplitPart, manifest: Manifest, found: Verification, on_bytes: OnBytes) -> None:
    if part.binary is None or part.index is None:
        return
    index_is_whole = _compare(directory, part.index, found, on_bytes)
    binary = directory / part.binary.name
    if not _compare(directory, part.binary, found, on_bytes) or not index_is_whole:
        return  # whatever else is wrong follows from that
    try:
        index = read_index(directory / part.index.name)
    except ValueError as error:
        found.problems.append(f"{directory / part.index.name} is no index of an indexed dataset ({error}).")
        return
    counts = (len(index.document_bounds) - 1, len(index.sequence_lengths), index.tokens)
    problem = index.problem()
    if problem is None and counts != (part.documents, part.documents, part.tokens):
        problem = f"it has {counts[0]} documents and {counts[2]} tokens, the manifest {part.documents}, {part.tokens}"
    if problem is not None:
        found.problems.append(f"{directory / part.index.name}: {problem}.")
        return
    found.problems += [f"{binary}: {problem}." for problem in _wrong_ids(binary, index, manifest)]
    found.documents += part.documents
    found.tokens += part.tokens


def _compare(directory: Path, file: FileRecord, found: Verification, on_bytes: OnBytes) -> bool:
    """Whether a file has the size and the checksum of its record."""
    path = directory / file.name
    digest = hashlib.sha256()
    size = 0
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                found.add_bytes(len(chunk), on_bytes)
    except OSError as error:
        found.problems.append(f"{path} cannot be read ({error.strerror}).")
        return False
    found.files += 1
    if size != file.bytes:
        cut = "it was cut short" if size < file.bytes else "something was written behind its end"
        found.problems.append(f"{path} has {size} bytes instead of {file.bytes}: {cut}.")
        return False
    if digest.hexdigest() != file.sha256:
        found.problems.append(f"{path} has changed since it was written: its SHA-256 is not the manifest's.")
        return False
    return True


def _wrong_ids(binary: Path, index: Index, manifest: Manifest) -> list[str]:
    """What is wrong with the ids of a file whose size fits its index."""
    tokens = np.asarray(np.memmap(binary, dtype=index.dtype, mode="r"))
    ends = np.cumsum(index.sequence_lengths, dtype=np.int64)
    starts = ends - index.sequence_lengths
    marks = 0
    step = _CHUNK_BYTES // index.dtype.itemsize
    for first in range(0, len(tokens), step):
        chunk = tokens[first : first + step]
        outside = (chunk < 0) | (chunk >= manifest.stored_vocab_size)
        if outside.any():
            place = int(outside.argmax())
            document = int(np.searchsorted(ends, first + place, side="right"))
            return [
                f"its document {document} holds the id {chunk[place]}, but the tokenizer's are 0 to"
                f" {manifest.stored_vocab_size - 1}"
            ]
        marks += int((chunk == manifest.boundary_id).sum())
    unmarked = tokens[starts] != manifest.boundary_id
    if unmarked.any():
        return [f"its document {int(unmarked.argmax())} does not begin with the mark {manifest.boundary_id}"]
    if marks != len(starts):
        return [f"it has {marks} marks ({manifest.boundary_id}) for {len(starts)} documents"]
    return []


def _verify_indexed(prefix: str, found: Verification, on_bytes: OnBytes) -> None:
    found.has_checksums = False
    binary, path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    missing = [file for file in (binary, path) if not file.is_file()]
    if missing:
        found.problems.append(f"{missing[0]} does not exist.")
        return
    try:
        index = read_index(path)
    except ValueError as error:
        found.problems.append(f"{path} is no index of an indexed dataset ({error}).")
        return
    problem = index.problem()
    if problem is not None:
        found.problems.append(f"{path}: {problem}.")
        return
    found.files += 2
    found.add_bytes(path.stat().st_size, on_bytes)
    size, expected = binary.stat().st_size, index.tokens * index.dtype.itemsize
    if size != expected:
        found.problems.append(f"{binary} has {size} bytes, but its index says {expected}.")
        return
    if size:
        tokens = np.asarray(np.memmap(binary, dtype=index.dtype, mode="r"))
        step = _CHUNK_BYTES // index.dtype.itemsize
        for first in range(0, len(tokens), step):
            chunk = tokens[first : first + step]
            if chunk.min() < 0:
                found.problems.append(f"{binary} holds the id {chunk.min()}; ids are 0 or more.")
                break
            found.add_bytes(chunk.nbytes, on_bytes)
    found.documents += len(index.document_bounds) - 1
    found.tokens += index.tokens
