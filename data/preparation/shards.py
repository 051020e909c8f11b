"""Writes the files of one shard."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from data.documents import SPLITS
from data.indexed_format import index_content
from data.preparation.encoding import EncodedGroup, EncodedPart
from data.preparation.files import flush_directory, flush_file, temporary_name
from data.preparation.manifest import FileRecord, ShardRecord, SplitPart
from data.source import Split


def shard_name(split: Split, number: int) -> str:
    """The path of a shard's files, without the ending, in its directory."""
    return f"{split}-{number:05d}"


class _PartWriter:
    """One split of a shard. The ids go to a file with another name until the shard is whole."""

    def __init__(self, binary: Path, index: Path, dtype: np.dtype) -> None:
        self.binary, self.index, self.dtype = binary, index, dtype
        self.temporary = temporary_name(binary)
        self.temporary_index = temporary_name(index)
        self.file = open(self.temporary, "xb")
        self.digest = hashlib.sha256()
        self.lengths: list[np.ndarray] = []
        self.tokens = 0

    def add(self, part: EncodedPart) -> None:
        content = memoryview(part.tokens).cast("B")
        self.file.write(content)
        self.digest.update(content)
        self.lengths.append(part.lengths)
        self.tokens += len(part.tokens)

    def finish(self) -> tuple[FileRecord, FileRecord]:
        """Flushes both files under their temporary names; ``rename`` follows."""
        self.file.flush()
        flush_file(self.file.fileno())
        self.file.close()
        content = index_content(self.dtype, np.concatenate(self.lengths))
        with open(self.temporary_index, "xb") as file:
            file.write(content)
            file.flush()
            flush_file(file.fileno())
        size = self.tokens * self.dtype.itemsize
        return (
            FileRecord(name=self.binary.name, bytes=size, sha256=self.digest.hexdigest()),
            FileRecord(name=self.index.name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()),
        )

    def rename(self) -> None:
        self.temporary.replace(self.binary)
        self.temporary_index.replace(self.index)

    def discard(self) -> None:
        self.file.close()
        for path in (self.temporary, self.temporary_index):
            path.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard: ``finish`` or ``discard`` ends it."""

    def __init__(self, directory: Path, number: int, dtype: np.dtype) -> None:
        self._directory, self._number, self._dtype = directory, number, dtype
        self._files: dict[Split, _PartWriter] = {}
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._empty = dict.fromkeys(SPLITS, 0)
        self._invalid = dict.fromkeys(SPLITS, 0)

    def add(self, group: EncodedGroup) -> None:
        """Appends the documents of a group."""
        for split, part in group.items():
            self._bytes[split] += part.bytes
            self._empty[split] += part.empty_documents
            self._invalid[split] += part.invalid_utf8_documents
            if not len(part.lengths):
                continue
            if split not in self._files:
                path = self._directory / shard_name(split, self._number)
                self._files[split] = _PartWriter(path.with_suffix(".bin"), path.with_suffix(".idx"), self._dtype)
            self._files[split].add(part)

    def finish(self, source_sha256: str) -> ShardRecord:
        """Gives the files their names, and says what they hold."""
        parts: dict[Split, SplitPart] = {}
        for split in SPLITS:
            file = self._files.get(split)
            binary, index = file.finish() if file else (None, None)
            parts[split] = SplitPart(
                documents=sum(map(len, file.lengths)) if file else 0,
                tokens=file.tokens if file else 0,
                bytes=self._bytes[split],
                empty_documents=self._empty[split],
                invalid_utf8_documents=self._invalid[split],
                binary=binary,
                index=index,
            )
        for file in self._files.values():
            file.rename()
        flush_directory(self._directory)
        return ShardRecord(source_sha256=source_sha256, **parts)

    def discard(self) -> None:
        """Takes away what was written."""
        for file in self._files.values():
            file.discard()
