"""Files as documents: texts anywhere, and the running Python's own library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.config import TextFilesSource
from data.errors import DataError
from data.source import Cursor, Document, DocumentReader, fingerprint_files

STANDARD_LIBRARY_SUFFIXES = frozenset({".py", ".pyi", ".txt", ".rst", ".md", ".cfg", ".toml", ".ini"})
STANDARD_LIBRARY_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})


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


def open_standard_library() -> FileDocuments:
    """Source code and texts of the running Python's own library. Raises ``DataError`` where it is not a directory."""
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


def open_text_files(config: TextFilesSource) -> FileDocuments:
    """The files that ``config`` describes. Raises ``DataError`` where there are none."""
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
