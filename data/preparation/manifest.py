"""What a prepared directory says of itself.

``manifest.json`` is written last, so a directory that has one is finished. Until then ``unfinished.json`` holds the
plan, and ``shard-00000.json`` and so on the records of the shards that are done. Nothing in these files depends on
when, where or by how many processes they were written.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data.config import TokenizerConfig
from data.documents import SPLITS, SplitCounts, content_fingerprint
from data.errors import DataError
from data.preparation.files import write_whole
from data.source import Split

# Raised whenever the stored form, the split or the cutting into shards changes.
FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
PLAN_FILE = "unfinished.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """A file of the directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    bytes: int = Field(ge=0)
    sha256: str


class SplitPart(_Record):
    """What a shard has of one split. Without documents it has no files."""

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)  # marks counted
    bytes: int = Field(ge=0)  # of the raw documents
    empty_documents: int = Field(ge=0)  # left out
    invalid_utf8_documents: int = Field(ge=0)
    binary: FileRecord | None
    index: FileRecord | None

    @model_validator(mode="after")
    def _has_the_files_of_its_documents(self) -> SplitPart:
        for name, file in (("binary", self.binary), ("index", self.index)):
            if (file is None) != (self.documents == 0):
                raise ValueError(f"{name} is {'missing' if file is None else 'there'}, with {self.documents} documents")
        return self


class ShardRecord(_Record):
    """One shard."""

    source_sha256: str  # of every document that was read for it
    train: SplitPart
    held_out: SplitPart

    def part(self, split: Split) -> SplitPart:
        return self.train if split == "train" else self.held_out

    def files(self) -> list[FileRecord]:
        return [file for split in SPLITS for file in (self.part(split).binary, self.part(split).index) if file]


class Plan(_Record):
    """Everything that decides what the shards hold."""

    format_version: Literal[2] = FORMAT_VERSION
    source: dict[str, Any]  # its settings, but for where it lies
    source_fingerprint: str
    tokenizer: TokenizerConfig  # opens it again; its path is that of ``tokenizer_file`` where there is one
    tokenizer_file: FileRecord | None  # a copy, beside the shards
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=1)  # a model's ids are below it
    stored_vocab_size: int = Field(ge=1)  # and stored ids below this, which may also say where words start
    boundary_id: int = Field(ge=0)  # in front of each document
    dtype: Literal["uint16", "int32"]
    held_out_fraction: float
    deduplicate: bool
    shard_megabytes: float

    def tokenizer_in(self, directory: Path) -> TokenizerConfig:
        """What opens the tokenizer again: by its copy in ``directory``, where there is one."""
        if self.tokenizer_file is None:
            return self.tokenizer
        return self.tokenizer.model_copy(update={"path": str(directory / self.tokenizer_file.name)})

    @property
    def token_type(self) -> np.dtype:
        return np.dtype(self.dtype)

    def difference(self, other: Plan) -> str | None:
        """The first thing in which two plans differ, in words; None where there is nothing."""
        if self.tokenizer_fingerprint != other.tokenizer_fingerprint:
            return "another tokenizer"
        for name, value in self.source.items():
            if other.source.get(name) != value:
                return f"data.source.{name}={json.dumps(other.source.get(name))} instead of {json.dumps(value)}"
        for name, key in (
            ("held_out_fraction", "data.held_out_fraction"),
            ("deduplicate", "deduplicate"),
            ("shard_megabytes", "shard-megabytes"),
        ):
            if getattr(self, name) != getattr(other, name):
                return f"{key}={json.dumps(getattr(other, name))} instead of {json.dumps(getattr(self, name))}"
        if self.source_fingerprint != other.source_fingerprint:
            return "other files in data.source, or files that were changed since"
        return None


class Totals(_Record):
    """One split over all shards."""

    documents: int
    tokens: int
    bytes: int
    empty_documents: int
    invalid_utf8_documents: int


class Manifest(Plan):
    """A finished directory."""

    shards: list[ShardRecord]
    train: Totals
    held_out: Totals
    duplicate_documents: int  # that repeat an earlier one byte for byte; left out where ``deduplicate``
    duplicate_bytes: int
    filtered_records: int
    skipped_records: int
    sha256: str = ""  # of all the rest of this file

    def counts(self, split: Split) -> SplitCounts:
        """A split in numbers, with a fingerprint that follows from the shards' checksums."""
        binaries = [part.binary for shard in self.shards if (part := shard.part(split)).binary]
        totals = self.train if split == "train" else self.held_out
        return SplitCounts(**totals.model_dump(), sha256=content_fingerprint([file.sha256 for file in binaries]))

    def files(self) -> list[FileRecord]:
        """Every file that belongs to the directory, but for the manifest itself."""
        own = [self.tokenizer_file] if self.tokenizer_file else []
        return own + [file for shard in self.shards for file in shard.files()]


def finished_manifest(
    plan: Plan, shards: list[ShardRecord], duplicates: tuple[int, int], left_out: tuple[int, int]
) -> Manifest:
    """The manifest of a plan that was carried out.

    Args:
        duplicates: documents and bytes.
        left_out: records that were filtered, and skipped.
    """
    totals = {
        split: Totals(
            **{name: sum(getattr(shard.part(split), name) for shard in shards) for name in Totals.model_fields}
        )
        for split in SPLITS
    }
    manifest = Manifest(
        **plan.model_dump(),
        shards=shards,
        **totals,
        duplicate_documents=duplicates[0],
        duplicate_bytes=duplicates[1],
        filtered_records=left_out[0],
        skipped_records=left_out[1],
    )
    return manifest.model_copy(update={"sha256": _own_sha256(manifest)})


def _own_sha256(manifest: Manifest) -> str:
    content = manifest.model_dump(mode="json", exclude={"sha256"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Raises ``DataError`` for a directory that is unfinished, not a prepared one, or whose manifest is damaged."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise DataError(why_no_manifest(directory))
    try:
        manifest = read_record(path, Manifest)
        if manifest.sha256 != _own_sha256(manifest):
            raise ValueError("its own SHA-256 differs")
    except ValueError as error:
        raise DataError(
            f"{path} is damaged or of another format version ({error}); copy it again, or delete {directory} and"
            " prepare it anew."
        ) from error
    return manifest


def why_no_manifest(directory: Path) -> str:
    """What a directory without a manifest is, and what to do about it."""
    if not directory.is_dir():
        return f"{directory} does not exist; give a directory that `pretrain data prepare` wrote."
    if (directory / PLAN_FILE).is_file():
        return (
            f"{directory} is unfinished: its preparation was broken off or is still running; start"
            " `pretrain data prepare` again as before, which goes on with the shards that are missing."
        )
    prepared = sorted(path.parent.name for path in directory.glob(f"*/{MANIFEST_FILE}"))
    if prepared:
        return (
            f"{directory} holds several prepared sources ({', '.join(prepared)}); give one of these directories, or"
            " each as a source of data.mixture."
        )
    return f"{directory} has no {MANIFEST_FILE}, so it is no directory that `pretrain data prepare` finished."


_Model = TypeVar("_Model", bound=_Record)


def read_record(path: Path, model: type[_Model]) -> _Model:
    """A JSON file as a ``model``. Raises ``ValueError`` with a short reason."""
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def write_record(path: Path, record: _Record) -> None:
    """Writes a record as JSON, whole or not at all."""
    write_whole(path, (record.model_dump_json(indent=1) + "\n").encode())
