"""The on-disk form of a checkpoint: names, manifest, and the checks that reader and writer share.

A checkpoint is one directory::

    step-00000100/
      shard-00000-0000.safetensors   tensors, written by rank 0, first file
      shard-00003-0001.safetensors   tensors, written by rank 3, second file
      state.json                     schedule, data position, random state, counters, resolved config
      manifest.json                  written last: what the directory holds, with sizes and checksums

Only JSON and safetensors: reading a checkpoint never executes anything it holds. This module needs no
torch, so listing and inspecting checkpoints is quick and works where torch is not installed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.errors import InputError, TrainingError

FORMAT_NAME = "recurrent-pretrain-checkpoint"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
KINDS = ("weight", "exp_avg", "exp_avg_sq", "state")
BYTES_PER_ELEMENT = {"float32": 4}

_SHARD_NAME = re.compile(r"shard-[0-9]{5,}-[0-9]{4,}\.safetensors")
# No halves of characters either, which no file can hold as text.
_TENSOR_NAME = re.compile(r"[^|\x00-\x1f\x7f\ud800-\udfff]{1,1000}")
_MOST_DIMENSIONS = 16
_MOST_ELEMENTS = 2**60

Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Text = Annotated[str, Field(strict=True)]
Digest = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]


class CheckpointError(TrainingError):
    """A checkpoint could not be saved (disk full, read-only directory, inconsistent pieces).

    Raised on every rank with the same message. Earlier checkpoints are untouched.
    """


def shard_file_name(rank: int, index: int) -> str:
    """File name of the ``index``-th shard that ``rank`` writes."""
    return f"shard-{rank:05d}-{index:04d}.safetensors"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PieceRecord(_Record):
    """One stored piece of a global tensor: all of it, or a range along one dimension.

    ``dimension`` and ``length`` are ``None`` for a whole tensor, and ``offset`` is then 0.
    """

    name: Text
    kind: Literal["weight", "exp_avg", "exp_avg_sq", "state"]
    dtype: Literal["float32"]
    full_shape: tuple[Count, ...]
    dimension: Count | None
    offset: Count
    length: Count | None

    @property
    def key(self) -> str:
        """The tensor's key inside its safetensors file."""
        whole = f"{self.name}|{self.kind}"
        return whole if self.dimension is None else f"{whole}|{self.offset}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored piece."""
        if self.dimension is None:
            return self.full_shape
        return (*self.full_shape[: self.dimension], self.length or 0, *self.full_shape[self.dimension + 1 :])

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BYTES_PER_ELEMENT[self.dtype]


class FileRecord(_Record):
    """Name, size and SHA-256 of one file of the checkpoint."""

    file: Text
    bytes: Count
    sha256: Digest


class ShardRecord(FileRecord):
    """One safetensors file and the pieces it holds."""

    tensors: tuple[PieceRecord, ...]


class Manifest(_Record):
    """What ``manifest.json`` says; ``checksum`` guards the manifest itself."""

    format: Literal["recurrent-pretrain-checkpoint"] = FORMAT_NAME
    version: Literal[1] = FORMAT_VERSION
    step: Count
    state: FileRecord
    shards: tuple[ShardRecord, ...]

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file but the manifest."""
        return (self.state, *self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(record.bytes for record in self.files)

    def tensors(self) -> dict[tuple[str, str], list[tuple[PieceRecord, str]]]:
        """The pieces of every (name, kind), in order of offset, each with its file name."""
        grouped: dict[tuple[str, str], list[tuple[PieceRecord, str]]] = defaultdict(list)
        for shard in self.shards:
            for piece in shard.tensors:
                grouped[piece.name, piece.kind].append((piece, shard.file))
        return {key: sorted(grouped[key], key=lambda entry: entry[0].offset) for key in sorted(grouped)}


def manifest_checksum(body: dict[str, Any]) -> str:
    """SHA-256 of a manifest's JSON body without its ``checksum`` key."""
    rest = {key: value for key, value in body.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_to_json(manifest: Manifest) -> str:
    """The text of ``manifest.json``; the same manifest always gives the same text."""
    body = manifest.model_dump(mode="json")
    return json.dumps({**body, "checksum": manifest_checksum(body)}, indent=1) + "\n"


def check_piece(piece: PieceRecord) -> None:
    """Raise ``ValueError`` unless the piece is well formed by itself."""
    label = f"tensor {piece.name!r} ({piece.kind})"
    if not _TENSOR_NAME.fullmatch(piece.name):
        raise ValueError(f"{label}: a name has 1 to 1000 characters, no '|' and no control characters")
    # Of a tensor without elements, too, sizes must be those of one that could be.
    if (
        len(piece.full_shape) > _MOST_DIMENSIONS
        or math.prod(max(size, 1) for size in piece.full_shape) > _MOST_ELEMENTS
    ):
        raise ValueError(f"{label}: no tensor has the shape {_shown(piece.full_shape)}")
    if piece.dimension is None:
        if piece.length is not None or piece.offset != 0:
            raise ValueError(f"{label}: a whole tensor has offset 0 and no length")
        return
    if piece.dimension >= len(piece.full_shape):
        raise ValueError(f"{label}: shape {list(piece.full_shape)} has no dimension {piece.dimension}")
    end = piece.offset + (piece.length or 0)
    if not piece.length or end > piece.full_shape[piece.dimension]:
        raise ValueError(
            f"{label}: the slice {piece.offset}..{end} is empty or exceeds dimension {piece.dimension} "
            f"of shape {list(piece.full_shape)}"
        )


def _shown(shape: tuple[int, ...]) -> str:
    return f"{list(shape[:8])}" if len(shape) <= 8 else f"{list(shape[:8])} and {len(shape) - 8} more dimensions"


def check_cover(pieces: Iterable[PieceRecord]) -> None:
    """Raise ``ValueError`` unless the pieces of one tensor, in order of offset, cover it exactly once."""
    pieces = list(pieces)
    first = pieces[0]
    label = f"tensor {first.name!r} ({first.kind})"
    for piece in pieces[1:]:
        for field in ("full_shape", "dtype", "dimension"):
            if getattr(piece, field) != getattr(first, field):
                raise ValueError(
                    f"{label}: its pieces disagree about {field} ({getattr(first, field)} and {getattr(piece, field)})"
                )
    if first.dimension is None:
        if len(pieces) > 1:
            raise ValueError(f"{label}: stored whole {len(pieces)} times (overlap), expected once")
        return
    position = 0
    for piece in pieces:
        if piece.offset != position:
            problem = "gap" if piece.offset > position else "overlap"
            low, high = sorted((position, piece.offset))
            raise ValueError(f"{label}: {problem} at {low}..{high} of dimension {first.dimension}")
        position += piece.length or 0
    size = first.full_shape[first.dimension]
    if position != size:
        raise ValueError(f"{label}: gap at {position}..{size} of dimension {first.dimension}")


def check_manifest(manifest: Manifest) -> None:
    """Raise ``ValueError`` unless names are safe and every tensor is covered exactly once."""
    if manifest.state.file != STATE_FILE:
        raise ValueError(f"the state file must be called {STATE_FILE!r}, not {manifest.state.file!r}")
    seen: set[str] = set()
    for shard in manifest.shards:
        if not _SHARD_NAME.fullmatch(shard.file):
            raise ValueError(f"{shard.file!r} is refused: not a name like {shard_file_name(0, 0)!r}")
        if shard.file in seen:
            raise ValueError(f"{shard.file} is listed more than once")
        seen.add(shard.file)
        for piece in shard.tensors:
            check_piece(piece)
        if sum(piece.num_bytes for piece in shard.tensors) > shard.bytes:
            raise ValueError(f"{shard.file} has {shard.bytes} bytes, fewer than its listed tensors")
    for pieces in manifest.tensors().values():
        check_cover(piece for piece, _ in pieces)


def check_file(directory: Path, name: str, expected_bytes: int | None = None) -> None:
    """Raise ``InputError`` unless ``name`` is a regular file in ``directory``, of the expected size in bytes.

    A symbolic link is refused: a checkpoint must not be able to point outside its own directory.
    """
    path = directory / name
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the checkpoint is incomplete; use an earlier one") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a regular file (links are refused); copy the file itself into place")
    if expected_bytes is not None and status.st_size != expected_bytes:
        raise InputError(
            f"{path} has {status.st_size} bytes where the manifest says {expected_bytes}: "
            "it was cut short or changed; use an earlier checkpoint"
        )


def read_manifest(directory: Path) -> Manifest:
    """Read and check ``manifest.json``: version, checksum, names, coverage, and the size of every file.

    Contents of the shards are not read; ``CheckpointReader.verify`` does that.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    path = directory / MANIFEST_FILE
    check_file(directory, MANIFEST_FILE)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); use an earlier checkpoint") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT_NAME:
        raise InputError(f"{path} is not the manifest of a checkpoint (no format {FORMAT_NAME!r})")
    if body.get("version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {body.get('version')!r}; this program reads version {FORMAT_VERSION}"
        )
    try:
        intact = body.pop("checksum", None) == manifest_checksum(body)
    except RecursionError:
        intact = False
    if not intact:
        raise InputError(f"{path} does not match its own checksum: damaged or edited; use an earlier one")
    try:
        manifest = Manifest.model_validate(body)
        check_manifest(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    for record in manifest.files:
        check_file(directory, record.file, record.bytes)
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_state(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """What ``state.json`` of a complete checkpoint holds.

    Raises:
        InputError: it is not what the manifest says, or is no JSON object.
    """
    path = directory / STATE_FILE
    if file_sha256(path) != manifest.state.sha256:
        raise InputError(f"{path} does not match its SHA-256 in {MANIFEST_FILE}; use an earlier one")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} must hold a JSON object")
    return state
