"""Documents through Hugging Face ``datasets``: hub, local files of any format it knows, object stores."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from data.config import HuggingFaceSource
from data.errors import DataError
from data.records import RecordReader
from data.source import Cursor, Document, DocumentReader, fingerprint_files

logger = logging.getLogger(__name__)

# A source over the network is asked again after so many seconds, then given up.
RETRY_SECONDS = (1, 4, 16, 64)

# So many rows at most are read again where a network fails.
_ROWS_BETWEEN_STATES = 256

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Names of builders that read plain files, given by data_files.
_FILE_BUILDERS = frozenset({"arrow", "csv", "json", "parquet", "text", "webdataset", "xml"})

Result = TypeVar("Result")


class HubDocuments:
    """Rows of a dataset, in its stored order."""

    def __init__(self, config: HuggingFaceSource) -> None:
        """Raises ``DataError`` when local files are missing."""
        self.config = config
        self.reader = RecordReader(config)
        self.local_files = _local_files(config)

    def read(self, cursor: Cursor | None = None) -> DocumentReader:
        """See ``Source.read``; a network that fails is asked again from the row where it failed."""
        # The library's own state leads to a row without reading those before it; a count alone does not.
        place = dict(cursor or {"row": 0, "state": None, "skipped": 0})
        self.reader = reader = RecordReader(self.config, place["skipped"])
        opened: list[_Rows] = []

        def current() -> Cursor:
            state = opened[-1].state() if opened else place["state"]
            return {"row": place["row"], "state": state, "skipped": reader.skipped}

        return DocumentReader(self._documents(place, reader, opened), current)

    def documents(self) -> Iterator[Document]:
        """See ``Source.documents``."""
        return self.read()

    def _documents(self, place: Cursor, reader: RecordReader, opened: list[_Rows]) -> Iterator[Document]:
        """Documents from ``place`` on, whose row is kept at the next one; ``opened`` holds the newest rows."""
        name = self.config.path if self.config.path not in _FILE_BUILDERS else "files"
        # From where the rows are opened again: a state of the library, and the row that it leads to.
        state, state_row = place["state"], place["row"]
        attempts = iter(RETRY_SECONDS)
        while True:
            try:
                rows = self._rows(place["row"] - state_row if state else place["row"], state)
                opened[:] = [rows]
                for record in rows:
                    location = f"{self._described} row {place['row']}"
                    place["row"] += 1
                    attempts = iter(RETRY_SECONDS)
                    document = reader.document(name, location, record)
                    if document is not None:
                        yield document
                    if place["row"] - state_row >= _ROWS_BETWEEN_STATES:
                        state, state_row = rows.state(), place["row"]
                return
            except DataError:
                raise
            except Exception as error:  # each file system and format raises its own
                seconds = next(attempts, None)
                if self.local_files or seconds is None or not isinstance(error, OSError):
                    raise DataError(
                        f"{self._described} cannot be read at row {place['row']} ({type(error).__name__}: {error});"
                        " mend the file or leave it out, or check the network."
                    ) from error
                logger.warning("%s row %d: %s; asking again in %d s", self._described, place["row"], error, seconds)
                time.sleep(seconds)

    def fingerprint(self) -> str:
        """Of local files names, sizes and times; of the hub the commit; of other stores what they say of each file."""
        config = self.config
        settings = config.model_dump_json(exclude={"path", "data_files", "revision", "streaming"})
        if self.local_files:
            return fingerprint_files([(path.name, path) for path in self.local_files], "huggingface", settings)
        if config.path in _FILE_BUILDERS:
            stored = _asked(lambda: [_remote_state(url) for url in _as_list(config.data_files)], self._described)
        else:
            stored = _asked(self._commit, self._described)
        content = json.dumps([config.path, config.data_files, stored, settings], default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def _described(self) -> str:
        files = f" ({', '.join(_as_list(self.config.data_files))})" if self.config.data_files else ""
        return f"dataset {self.config.path}{files}"

    def _commit(self) -> str:
        """The commit that the revision names; a full hash needs no network."""
        if self.config.revision is not None and _COMMIT.fullmatch(self.config.revision):
            return self.config.revision
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(self.config.path, revision=self.config.revision).sha)

    def _rows(self, skipped: int, state: dict[str, Any] | None) -> _Rows:
        """The rows behind the first ``skipped``, counted from ``state`` of an earlier opening, or from the start."""
        import datasets

        config = self.config
        dataset = datasets.load_dataset(
            config.path,
            name=config.name,
            data_files=config.data_files,
            split=config.split,
            revision=config.revision,
            streaming=config.streaming,
        )
        if state is not None:
            dataset.load_state_dict(state)
        return _Rows(dataset, skipped)


class _Rows(Iterator[Any]):
    """The rows of an opened dataset, and how to find the next one again."""

    def __init__(self, dataset: Any, skipped: int) -> None:
        self._dataset, self._has_state = dataset, hasattr(dataset, "state_dict")
        # Skipping a streamed dataset makes another one, whose state would be counted from there.
        if self._has_state:
            self._rows = iter(dataset)
            for _ in range(skipped):
                next(self._rows, None)
        else:
            self._rows = iter(dataset.skip(skipped) if skipped else dataset)

    def __next__(self) -> Any:
        return next(self._rows)

    def state(self) -> dict[str, Any] | None:
        """What leads to the next row; None where a count of rows is enough."""
        return self._dataset.state_dict() if self._has_state else None


def _as_list(files: str | list[str] | None) -> list[str]:
    return [files] if isinstance(files, str) else list(files or [])


def _local_files(config: HuggingFaceSource) -> list[Path]:
    """Local files that the source reads, in order; none where it reads from the network."""
    if config.path in _FILE_BUILDERS:
        if not config.data_files:
            raise DataError(f"data.source.path {config.path} reads files, so data.source.data_files must name them.")
        patterns = _as_list(config.data_files)
        if any("://" in pattern for pattern in patterns):
            return []
        files: list[Path] = []
        for pattern in patterns:
            path = Path(pattern).expanduser()
            found = (
                [path] if path.is_file() else sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
            )
            if not any(file.is_file() for file in found):
                raise DataError(f"data.source.data_files {pattern} matches no file.")
            files += [file for file in found if file.is_file()]
        return files
    directory = Path(config.path).expanduser()
    if directory.is_dir():
        return sorted(path for path in directory.rglob("*") if path.is_file())
    return []


def _remote_state(pattern: str) -> list[object]:
    """What the store says of each file: name, size, and whichever of its version marks there is."""
    import fsspec

    system, path = fsspec.core.url_to_fs(pattern)
    files = sorted(system.glob(path))
    if not files:
        raise DataError(f"data.source.data_files {pattern} matches no file.")
    marks = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified")
    return [
        [file, *(str(info[mark]) for mark in marks if mark in info)] for file in files if (info := system.info(file))
    ]


def _asked(function: Callable[[], Result], described: str) -> Result:
    """What ``function`` returns, asked again where the network fails. Raises ``DataError`` in the end."""
    for seconds in (*RETRY_SECONDS, None):
        try:
            return function()
        except DataError:
            raise
        except Exception as error:  # each file system raises its own
            if seconds is None or not isinstance(error, OSError):
                raise DataError(
                    f"{described} cannot be found ({type(error).__name__}: {error}); check its name and the network,"
                    " or set data.source.revision to a commit, which needs none."
                ) from error
            logger.warning("%s: %s; asking again in %d s", described, error, seconds)
            time.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")
