"""Where documents come from. A source yields documents in a fixed order and can name its content cheaply."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from data.config import HuggingFaceSource, JsonlSource, SourceConfig, StandardLibrarySource, TextFilesSource
from data.errors import DataError

STANDARD_LIBRARY_SUFFIXES = frozenset({".py", ".pyi", ".txt", ".rst", ".md", ".cfg", ".toml", ".ini"})
STANDARD_LIBRARY_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Document:
    """One document of raw bytes.

    ``identity`` decides the split and does not depend on where the corpus lies or in which order it is read.
    ``location`` is what an error message names.
    """

    identity: str
    location: str
    content: bytes


# A place among a source's documents, as JSON holds it; only the source knows what is in it.
Cursor = dict[str, Any]


class DocumentReader(Iterator[Document]):
    """Documents of a source in its order, and where the next one is."""

    def __init__(self, documents: Iterator[Document], cursor: Callable[[], Cursor]) -> None:
        self._documents, self._cursor = documents, cursor

    def __next__(self) -> Document:
        return next(self._documents)

    def cursor(self) -> Cursor:
        """Where the next document is, for ``Source.read``; only between two documents."""
        return self._cursor()


class Source(Protocol):
    """What reads and prepares text needs from a source."""

    def read(self, cursor: Cursor | None = None) -> DocumentReader:
        """Documents in an order that never changes, from ``cursor`` on; None: from the first."""

    def documents(self) -> Iterator[Document]:
        """All documents, always in the same order."""

    def fingerprint(self) -> str:
        """Changes when the files' names, sizes or modification times do; reads no contents."""


def open_source(config: SourceConfig) -> Source:
    """The source that ``config`` describes. Raises ``DataError`` when its files are missing or hold no text."""
    match config:
        case StandardLibrarySource():
            return _open_standard_library()
        case TextFilesSource():
            return _open_text_files(config)
        case JsonlSource():
            from data.records import JsonlDocuments

            return JsonlDocuments(config)
        case HuggingFaceSource():
            from data.hub import HubDocuments

            return HubDocuments(config)
    raise DataError(
        f"data.source.type={config.type} holds token ids, but text is needed; give a source of text, for instance the"
        " one that was tokenized."
    )


def fingerprint_files(files: list[tuple[str, Path]], *settings: str) -> str:
    """Hash of names, sizes and modification times of ``files`` (name, path), and of ``settings``."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); check that it exists.") from error
        digest.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()


class FileDocuments:
    """Whole files as documents, or the parts of files between separators."""

    def __init__(self, files: list[tuple[str, Path]], separator: bytes | None = None) -> None:
        self.files = files
        self.separator = separator

    def read(self, cursor: Cursor | None = None) -> DocumentReader:
        """See ``Source.read``."""
        place = dict(cursor or {"file": 0, "part": 0})
        return DocumentReader(self._documents(place), lambda: dict(place))

    def documents(self) -> Iterator[Document]:
        """See ``Source.documents``."""
        return self.read()

    def _documents(self, place: Cursor) -> Iterator[Document]:
        """Documents from ``place`` on, which is kept at the next one."""
        for number in range(place["file"], len(self.files)):
            name, path = self.files[number]
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read ({error.strerror}); make it readable or leave it out."
                ) from error
            if self.separator is None:
                place["file"] = number + 1
                yield Document(name, str(path), content)
                continue
            parts = content.split(self.separator)
            for part in range(place["part"], len(parts)):
                place |= {"file": number, "part": part + 1}
                identity = f"{name}\0{hashlib.sha256(parts[part]).hexdigest()}"
                yield Document(identity, f"{path} part {part}", parts[part])
            place |= {"file": number + 1, "part": 0}

    def fingerprint(self) -> str:
        return fingerprint_files(self.files, "files", (self.separator or b"").hex())


def _open_standard_library() -> FileDocuments:
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise DataError(f"the standard library should be a directory at {root} but is not; use a text_files source.")
    files = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in STANDARD_LIBRARY_LEFT_OUT]
        for name in names:
            path = Path(directory, name)
            if path.suffix.lower() in STANDARD_LIBRARY_SUFFIXES and path.is_file():
                files.append((path.relative_to(root).as_posix(), path))
    return FileDocuments(sorted(files))


def _open_text_files(config: TextFilesSource) -> FileDocuments:
    path = Path(config.path).expanduser()
    if path.is_file():
        files = [(path.name, path)]
    elif path.is_dir():
        files = sorted((p.relative_to(path).as_posix(), p) for p in path.glob(config.pattern) if p.is_file())
    else:
        raise DataError(f"data.source.path {path} does not exist; give a directory of texts or one file.")
    if not files:
        raise DataError(
            f"no file below data.source.path {path} matches data.source.pattern {config.pattern!r};"
            " give the pattern of the files that hold the text."
        )
    return FileDocuments(files, config.document_separator.encode() if config.document_separator else None)
