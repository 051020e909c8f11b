"""One rank's part of a checkpoint: the pieces it holds, streamed into safetensors files of bounded size."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint.format import (
    KINDS,
    FileRecord,
    PieceRecord,
    ShardRecord,
    check_piece,
    file_sha256,
    shard_file_name,
)


@dataclass(frozen=True)
class TensorPiece:
    """What one rank holds of a global tensor.

    Attributes:
        name: global parameter name, or that of a recurrent state, the same under every layout.
        kind: ``weight`` (fp32 master), ``exp_avg``, ``exp_avg_sq``, or ``state`` (recurrent).
        tensor: the local piece, float32, on any device; may be reused by the caller after it was taken.
        full_shape: shape of the global tensor.
        dimension: the dimension along which the tensor is split, or ``None`` for the whole tensor.
        offset: where this piece starts along ``dimension``, in elements; 0 for a whole tensor.
    """

    name: str
    kind: str
    tensor: Tensor
    full_shape: tuple[int, ...]
    dimension: int | None = None
    offset: int = 0

    def record(self) -> PieceRecord:
        """The manifest entry of this piece; raises ``ValueError`` if the piece contradicts itself."""
        label = f"tensor {self.name!r} ({self.kind})"
        if self.kind not in KINDS:
            raise ValueError(f"{label}: kind must be one of {', '.join(KINDS)}")
        if self.tensor.dtype != torch.float32:
            raise ValueError(f"{label}: expected float32, got {self.tensor.dtype}; pass the fp32 master copy")
        whole = self.dimension is None
        length = None if whole or self.dimension >= self.tensor.dim() else self.tensor.shape[self.dimension]
        record = PieceRecord(
            name=self.name,
            kind=self.kind,
            dtype="float32",
            full_shape=tuple(self.full_shape),
            dimension=self.dimension,
            offset=self.offset,
            length=length,
        )
        check_piece(record)
        if tuple(self.tensor.shape) != record.shape:
            raise ValueError(
                f"{label}: local shape {list(self.tensor.shape)} does not fit full shape "
                f"{list(self.full_shape)} split along dimension {self.dimension}"
            )
        return record

    def is_empty_slice(self) -> bool:
        """Whether this rank holds nothing of the tensor (an uneven split may leave a rank without any)."""
        return self.dimension is not None and self.tensor.numel() == 0


class ShardStream:
    """Collects pieces and writes a shard file each time the next piece would exceed the bound.

    Args:
        copy: whether to collect copies; else a piece must stay as it is, contiguous on the CPU, until its shard is
            written.
    """

    def __init__(self, directory: Path, rank: int, max_shard_bytes: int, copy: bool = True) -> None:
        self.directory = directory
        self.rank = rank
        self.max_shard_bytes = max_shard_bytes
        self.copy = copy
        self.shards: list[ShardRecord] = []
        self._tensors: dict[str, Tensor] = {}
        self._records: list[PieceRecord] = []
        self._bytes = 0
        self._buffer: Tensor | None = None

    def add(self, piece: TensorPiece) -> None:
        """Take the piece; raises ``ValueError`` for a piece that contradicts itself, ``OSError`` or
        ``SafetensorError`` when a shard cannot be written."""
        if piece.is_empty_slice():
            return
        record = piece.record()
        if record.key in self._tensors:
            raise ValueError(f"tensor {record.name!r} ({record.kind}) was given twice at {record.offset}")
        if self._records and self._bytes + record.num_bytes > self.max_shard_bytes:
            self.flush()
        tensor = piece.tensor.detach()
        if self.copy:
            # The caller may reuse its buffer, and a view would keep a whole flat buffer alive.
            tensor = self._room_for(record).copy_(tensor)
        self._tensors[record.key] = tensor
        self._records.append(record)
        self._bytes += record.num_bytes

    def _room_for(self, record: PieceRecord) -> Tensor:
        """An uninitialised tensor of the record's shape, out of one buffer that every shard uses again.

        Allocating each piece by itself doubled the resident memory: freed pieces left holes between others.
        """
        if record.num_bytes > self.max_shard_bytes:
            return torch.empty(record.shape, dtype=torch.float32)
        if self._buffer is None:
            self._buffer = torch.empty(self.max_shard_bytes // 4, dtype=torch.float32)
        start = self._bytes // 4
        return self._buffer[start : start + record.num_bytes // 4].view(record.shape)

    def flush(self) -> None:
        """Write what was collected as one shard file, forced to disk."""
        if not self._records:
            return
        path = self.directory / shard_file_name(self.rank, len(self.shards))
        save_file(self._tensors, path, metadata={"format": "pt"})
        file = describe_durably(path)
        self.shards.append(ShardRecord(**file.model_dump(), tensors=tuple(self._records)))
        self.clear()

    def clear(self) -> None:
        """Drop what was collected."""
        self._tensors, self._records, self._bytes = {}, [], 0


def write_durably(path: Path, text: str) -> FileRecord:
    """Write a text file, force it to disk and describe it."""
    path.write_text(text, encoding="utf-8")
    return describe_durably(path)


def describe_durably(path: Path) -> FileRecord:
    """Force a written file to disk and give its name, size in bytes and SHA-256."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(file=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))
