"""What a source of documents is: it yields them in a fixed order, and can name its content cheaply."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from data.errors import DataError

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
