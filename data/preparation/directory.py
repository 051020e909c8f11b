"""Prepares a source into a directory: shards of ids and a manifest, the same bytes however often it was broken off.

A shard gets its record when its files are on the disk. Whoever starts again reads the source from the beginning, to
find the duplicates and the cuts between shards, but tokenizes only what belongs to shards without a record.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from data.errors import DataError
from data.preparation.encoding import GroupEncoder
from data.preparation.files import LOCK_FILE, flush_directory, only_process, temporary_files, write_whole
from data.preparation.manifest import (
    MANIFEST_FILE,
    PLAN_FILE,
    Manifest,
    Plan,
    ShardRecord,
    finished_manifest,
    read_manifest,
    read_record,
    write_record,
)
from data.preparation.plan import Options, make_plan
from data.preparation.reading import ShardReader
from data.preparation.shards import ShardWriter
from data.source import Source
from data.sources import open_source
from data.text_files import FileDocuments
from data.tokenizers import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparationState:
    """How far a preparation is."""

    shards: int  # begun
    documents: int  # read, duplicates included
    bytes: int  # of raw text that was read
    total_bytes: int | None  # of the source, where its files say so
    tokens: int
    duplicate_documents: int


OnProgress = Callable[[PreparationState], None]


def prepare_directory(
    config: DataConfig,
    tokenizer: Tokenizer,
    directory: Path,
    options: Options,
    workers: int = 0,
    on_progress: OnProgress = lambda state: None,
) -> Manifest:
    """Prepares the only source of ``config``, goes on with what was begun, or finds that everything is there.

    Any number of processes may call this at once: one does the work, the others wait for it. Where the file system
    has no locks each does it, and all write the same.

    Args:
        workers: processes that tokenize; 0: this one does.

    Raises:
        DataError: for a bad source or tokenizer, and for a directory that holds something else, or was begun from
            another source or with other options.
        OSError: the directory cannot be written.
    """
    source = open_source(config.source)
    plan, tokenizer_content = make_plan(config, source, tokenizer, options)
    if not _is_finished(directory):
        _refuse_foreign(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with only_process(directory, lambda: logger.warning("another process prepares %s; waiting", directory)) as only:
            if not (directory / MANIFEST_FILE).is_file():
                directory.mkdir(exist_ok=True)  # who had the lock before may have found the source unfit
                if only:
                    for path in temporary_files(directory):
                        path.unlink(missing_ok=True)
                _begin(directory, plan, tokenizer_content)
                _carry_out(source, tokenizer, directory, plan, options, workers, on_progress)
            _tidy(directory)
    manifest = read_manifest(directory)
    _refuse_other(directory, "holds", manifest, plan)
    return manifest


def _is_finished(directory: Path) -> bool:
    return (directory / MANIFEST_FILE).is_file() and not (directory / PLAN_FILE).is_file()


def _refuse_foreign(directory: Path) -> None:
    """Raises ``DataError`` for a file, and for a directory with something in it that is not a preparation."""
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory} is a file; give a new directory for the prepared data.")
    if not directory.is_dir():
        return
    own = {LOCK_FILE, *(path.name for path in temporary_files(directory))}
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in own)
    if foreign and not any((directory / name).is_file() for name in (PLAN_FILE, MANIFEST_FILE)):
        raise DataError(
            f"{directory} holds other files ({', '.join(foreign[:3])}); give a new directory for the prepared data."
        )


def _refuse_other(directory: Path, verb: str, found: Plan, wanted: Plan) -> None:
    difference = found.difference(wanted)
    if difference is not None:
        raise DataError(
            f"{directory} {verb} data from another preparation: now there is {difference}; give another directory,"
            " or delete this one to prepare it anew."
        )


def _begin(directory: Path, plan: Plan, tokenizer_content: bytes | None) -> None:
    """Puts down what is going to be done, or compares it with what an earlier start has put down."""
    path = directory / PLAN_FILE
    if path.is_file():
        try:
            begun = read_record(path, Plan)
        except ValueError as error:
            raise DataError(
                f"{path} is damaged or of another format version ({error}); delete {directory} and start again."
            ) from error
        _refuse_other(directory, "has begun with", begun, plan)
    else:
        write_record(path, plan)
    if plan.tokenizer_file is not None and tokenizer_content is not None:
        copy = directory / plan.tokenizer_file.name
        if not copy.is_file():
            write_whole(copy, tokenizer_content)


def _carry_out(
    source: Source,
    tokenizer: Tokenizer,
    directory: Path,
    plan: Plan,
    options: Options,
    workers: int,
    on_progress: OnProgress,
) -> None:
    """Writes the shards that are missing, then the manifest."""
    records = _finished_shards(directory)
    found = frozenset(records)
    total_bytes = _total_bytes(source)
    tokens = sum(record.train.tokens + record.held_out.tokens for record in records.values())
    reader = ShardReader(source, plan.held_out_fraction, options.deduplicate, options.shard_bytes)
    writer: ShardWriter | None = None
    with GroupEncoder(tokenizer, plan.tokenizer_in(directory), workers) as encoder:
        try:
            for group, encoded in encoder.encode(reader.groups(), lambda group: group.shard not in found):
                if encoded is not None:
                    writer = writer or ShardWriter(directory, group.shard, plan.token_type)
                    writer.add(encoded)
                    tokens += sum(len(part.tokens) for part in encoded.values())
                if group.is_last and writer is not None:
                    records[group.shard] = writer.finish(group.source_sha256)
                    write_record(_record_path(directory, group.shard), records[group.shard])
                    writer = None
                elif group.is_last and records[group.shard].source_sha256 != group.source_sha256:
                    raise _source_changed(directory, group.shard)
                on_progress(_state_of(reader, total_bytes, tokens))
        finally:
            if writer is not None:
                writer.discard()
    on_progress(_state_of(reader, total_bytes, tokens))
    if len(records) != reader.shards:
        raise _source_changed(directory, reader.shards)
    try:
        reader.check_splits()
    except DataError:
        # Nothing of it is of use: other text or another fraction would be another preparation.
        _discard(directory, records, plan)
        raise
    shards = [records[number] for number in sorted(records)]
    duplicates = (reader.duplicate_documents, reader.duplicate_bytes)
    write_record(directory / MANIFEST_FILE, finished_manifest(plan, shards, duplicates, _left_out(source)))


def _state_of(reader: ShardReader, total_bytes: int | None, tokens: int) -> PreparationState:
    return PreparationState(
        reader.shards, reader.documents, reader.bytes, total_bytes, tokens, reader.duplicate_documents
    )


def _finished_shards(directory: Path) -> dict[int, ShardRecord]:
    """Shards that an earlier start has finished, by number."""
    records: dict[int, ShardRecord] = {}
    for path in sorted(directory.glob("shard-*.json")):
        try:
            record = read_record(path, ShardRecord)
            number = int(path.stem.removeprefix("shard-"))
            sizes = [(directory / file.name).stat().st_size == file.bytes for file in record.files()]
        except (OSError, ValueError):
            continue
        if all(sizes):
            records[number] = record
    return records


def _record_path(directory: Path, shard: int) -> Path:
    return directory / f"shard-{shard:05d}.json"


def _source_changed(directory: Path, shard: int) -> DataError:
    return DataError(
        f"data.source is no longer what {directory} was begun with: other documents come where shard {shard} was read;"
        " delete that directory and start again."
    )


def _tidy(directory: Path) -> None:
    """Takes away what is of no use behind the manifest. The lock too: who still waits for it will see the manifest."""
    for path in (*directory.glob("shard-*.json"), directory / LOCK_FILE):
        path.unlink(missing_ok=True)
    # Last, since it says that there is something to tidy.
    (directory / PLAN_FILE).unlink(missing_ok=True)
    flush_directory(directory)


def _discard(directory: Path, records: dict[int, ShardRecord], plan: Plan) -> None:
    names = [file.name for record in records.values() for file in record.files()]
    if plan.tokenizer_file is not None:
        names.append(plan.tokenizer_file.name)
    for name in names:
        (directory / name).unlink(missing_ok=True)
    _tidy(directory)
    with contextlib.suppress(OSError):
        directory.rmdir()


def _total_bytes(source: Source) -> int | None:
    """Bytes of a source whose files are documents as they are."""
    if not isinstance(source, FileDocuments):
        return None
    return sum(path.stat().st_size for _, path in source.files)


def _left_out(source: Source) -> tuple[int, int]:
    """Records that a source of records has filtered, and skipped."""
    reader = getattr(source, "reader", None)
    return (reader.filtered, reader.skipped) if reader is not None else (0, 0)
