"""Records with a text among their fields: which of them are documents, and what happens to bad ones."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import logging
import lzma
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec

from data.config import JsonlSource, RecordsConfig
from data.errors import DataError
from data.source import Cursor, Document, DocumentReader, fingerprint_files

logger = logging.getLogger(__name__)


class RecordReader:
    """Turns the records of one source into documents, counting what it leaves out.

    Attributes:
        filtered: records that the source's filters leave out.
        skipped: bad records that were left out because the source says so.
    """

    def __init__(self, config: RecordsConfig, skipped: int = 0) -> None:
        """``skipped``: bad records that an earlier reading, which this one continues, left out."""
        self.config = config
        self.filtered, self.skipped = 0, skipped

    def document(self, name: str, location: str, record: Any) -> Document | None:
        """The document in ``record``; None where it is filtered out, or is bad and may be skipped.

        Args:
            name: of the file or dataset, part of the document's identity.
            location: what a message calls this record.

        Raises:
            DataError: the record has no such text, and bad records stop or there are too many.
        """
        config = self.config
        text = record.get(config.text_field) if isinstance(record, Mapping) else None
        if not isinstance(text, str):
            kind = type(record).__name__
            held = f"the keys {sorted(record)[:8]}" if isinstance(record, Mapping) else f"a {kind}"
            self.bad(
                f"{location} should hold a string under {config.text_field!r} but holds {held};"
                " set text_field to the key of the text, or mend this record"
            )
            return None
        if not self._is_wanted(text, record):
            self.filtered += 1
            return None
        # JSON can spell half of a surrogate pair, which strict UTF-8 cannot.
        content = text.encode("utf-8", errors="surrogatepass")
        return Document(f"{name}\0{hashlib.sha256(content).hexdigest()}", location, content)

    def bad(self, message: str) -> None:
        """Takes note of a bad record. Raises ``DataError`` with ``message`` unless it may be skipped."""
        if self.config.bad_records == "stop":
            raise DataError(f"{message}, or set bad_records to skip.")
        self.skipped += 1
        if self.skipped > self.config.maximum_bad_records:
            raise DataError(
                f"{message}. It is bad record number {self.skipped}, and maximum_bad_records is"
                f" {self.config.maximum_bad_records}."
            )
        logger.warning("skipped: %s", message)

    def _is_wanted(self, text: str, record: Mapping[str, Any]) -> bool:
        config = self.config
        if len(text) < config.minimum_characters:
            return False
        if config.maximum_characters is not None and len(text) > config.maximum_characters:
            return False
        return all(_field(record, key) in wanted for key, wanted in config.keep.items())


def _field(record: Mapping[str, Any], key: str) -> Any:
    """A field by its dotted name, such as ``meta.language``; None where there is none."""
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


class JsonlDocuments:
    """Each line of each file is a JSON object whose ``text_field`` holds one document."""

    def __init__(self, config: JsonlSource) -> None:
        pattern = os.path.expanduser(config.path)
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        self.files = [(Path(name).name, Path(name)) for name in found if os.path.isfile(name)]
        self.config = config
        if not self.files:
            raise DataError(
                f"data.source.path {config.path} matches no file; give a .jsonl file or a glob such as corpus/*.jsonl."
            )
        self.reader = RecordReader(config)

    def read(self, cursor: Cursor | None = None) -> DocumentReader:
        """See ``Source.read``. The newest reading's counts are in ``reader``."""
        # Byte offset and number of the line before the next, the file uncompressed.
        place = dict(cursor or {"file": 0, "offset": 0, "line": 0, "skipped": 0})
        self.reader = reader = RecordReader(self.config, place["skipped"])
        return DocumentReader(self._documents(place, reader), lambda: place | {"skipped": reader.skipped})

    def documents(self) -> Iterator[Document]:
        """See ``Source.documents``."""
        return self.read()

    def _documents(self, place: Cursor, reader: RecordReader) -> Iterator[Document]:
        """Documents from ``place`` on, which is kept at the next one."""
        for number in range(place["file"], len(self.files)):
            name, path = self.files[number]
            place["file"] = number
            try:
                with fsspec.open(str(path), "rb", compression=_compression(path)) as lines:
                    if place["offset"]:
                        lines.seek(place["offset"])
                    for line in lines:
                        place["offset"] += len(line)
                        place["line"] += 1
                        if line.strip():
                            document = _document(reader, name, f"{path} line {place['line']}", line)
                            if document is not None:
                                yield document
            # Each way of compressing raises its own for a file that is cut short or damaged.
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise DataError(
                    f"{path} cannot be read behind line {place['line']} ({error}); make it readable or leave it out of"
                    " data.source.path."
                ) from error
            place |= {"file": number + 1, "offset": 0, "line": 0}

    def fingerprint(self) -> str:
        settings = self.config.model_dump_json(exclude={"path"})
        return fingerprint_files([(str(path), path) for _, path in self.files], "jsonl", settings)


def _document(reader: RecordReader, name: str, location: str, line: bytes) -> Document | None:
    try:
        record = json.loads(line)
    except ValueError as error:
        reader.bad(
            f"{location} is not valid JSON ({error}); every line must be one JSON object, so mend or remove this line"
        )
        return None
    return reader.document(name, location, record)


def _compression(path: Path) -> str | None:
    """How a file is compressed, by its name. Raises ``DataError`` where a library for that is missing."""
    if path.suffix == ".zst":
        if importlib.util.find_spec("zstandard") is None:
            raise DataError(f"{path} needs the package zstandard to be read; install it (pip install zstandard).")
        return "zstd"
    return "infer"
