"""Reading a checkpoint: any slice of any tensor, whatever the layout it was written under."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.checkpoint.directory import verify_checksums_of
from pretrain.checkpoint.format import (
    MANIFEST_FILE,
    PieceRecord,
    ShardRecord,
    read_manifest,
    read_state,
)
from pretrain.errors import InputError


class CheckpointReader:
    """One complete checkpoint, opened for reading.

    Opening it checks the manifest (version, safe file names, sizes of all files, every tensor covered exactly
    once) and reads ``state.json``. Tensors are read on demand, only the bytes asked for; each process may
    read something else. Nothing here is collective.

    Raises:
        InputError: naming the file and what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"{self.path} is not a checkpoint directory")
        self.manifest = read_manifest(self.path)
        self.step: int = self.manifest.step
        self.state: dict[str, Any] = read_state(self.path, self.manifest)
        self._tensors = self.manifest.tensors()
        self._open_shards: dict[str, Any] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the opened shards; a later ``read`` opens them again."""
        self._open_shards.clear()

    def names(self, kind: str = "weight") -> list[str]:
        """Sorted global names of the tensors stored with ``kind``."""
        return [name for name, stored_kind in self._tensors if stored_kind == kind]

    def shape(self, name: str, kind: str = "weight") -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._pieces(name, kind)[0][0].full_shape

    def read(
        self,
        name: str,
        kind: str = "weight",
        dimension: int | None = None,
        offset: int = 0,
        length: int | None = None,
    ) -> Tensor:
        """Read a tensor, or ``length`` entries from ``offset`` along ``dimension`` (to the end if ``None``).

        The slice need not match how the tensor was split when written.

        Returns:
            A float32 CPU tensor of its own memory, contiguous.

        Raises:
            InputError: when the checkpoint lacks the tensor or a shard is damaged.
            ValueError: when the slice lies outside the tensor.
        """
        pieces = self._pieces(name, kind)
        shape = list(pieces[0][0].full_shape)
        if dimension is None:
            if offset != 0 or length is not None:
                raise ValueError(f"tensor {name!r}: offset and length need a dimension")
        else:
            if not 0 <= dimension < len(shape):
                raise ValueError(f"tensor {name!r} of shape {shape} has no dimension {dimension}")
            length = shape[dimension] - offset if length is None else length
            if offset < 0 or length < 0 or offset + length > shape[dimension]:
                raise ValueError(
                    f"tensor {name!r}: slice {offset}..{offset + length} lies outside dimension {dimension} "
                    f"of shape {shape}"
                )
            shape[dimension] = length
        output = torch.empty(shape, dtype=torch.float32)
        for piece, file in pieces if output.numel() else ():
            source = [slice(0, size) for size in piece.shape]
            target = [slice(0, size) for size in shape]
            if piece.dimension is not None and piece.dimension != dimension:
                target[piece.dimension] = slice(piece.offset, piece.offset + piece.shape[piece.dimension])
            if dimension is not None:
                start = piece.offset if piece.dimension == dimension else 0
                low = max(offset, start)
                high = min(offset + length, start + piece.shape[dimension])
                if low >= high:
                    continue
                source[dimension] = slice(low - start, high - start)
                target[dimension] = slice(low - offset, high - offset)
            output[tuple(target)].copy_(self._read_piece(piece, file, source))
        return output

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Read every file, compare its SHA-256 with the manifest, and each shard's header with its entries.

        Args:
            share: (index, count): check every count-th file only, so that ranks can divide the work, for
                instance ``(rank, world_size)``.

        Raises:
            InputError: naming the damaged files.
        """
        verify_checksums_of(self.path, self.manifest, share)
        index, count = share
        for record in self.manifest.files[index::count]:
            for piece in record.tensors if isinstance(record, ShardRecord) else ():
                self._stored_slice(piece, record.file)

    def _pieces(self, name: str, kind: str) -> list[tuple[PieceRecord, str]]:
        try:
            return self._tensors[name, kind]
        except KeyError:
            near = difflib.get_close_matches(name, self.names(kind), n=1)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise InputError(f"{self.path} holds no tensor {name!r} of kind {kind!r}{hint}") from None

    def _shard(self, file: str) -> Any:
        if file not in self._open_shards:
            self._open_shards[file] = safe_open(self.path / file, framework="pt", device="cpu")
        return self._open_shards[file]

    def _stored_slice(self, piece: PieceRecord, file: str) -> Any:
        """The lazy slice of a piece, after its header entry was compared with the manifest."""
        try:
            stored = self._shard(file).get_slice(piece.key)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path / file}: {piece.key!r} cannot be read: {error}") from error
        if shape != piece.shape or dtype != "F32":
            raise InputError(
                f"{self.path / file}: {piece.key!r} is {dtype} of shape {list(shape)}, "
                f"{MANIFEST_FILE} says F32 of shape {list(piece.shape)}"
            )
        return stored

    def _read_piece(self, piece: PieceRecord, file: str, source: list[slice]) -> Tensor:
        stored = self._stored_slice(piece, file)
        try:
            # A tensor without dimensions cannot be sliced.
            return stored[tuple(source)] if source else self._shard(file).get_tensor(piece.key)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path / file}: {piece.key!r} cannot be read: {error}") from error
