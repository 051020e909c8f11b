"""Weights of a checkpoint as the files of a Hugging Face directory, read piece by piece and written shard by shard."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint import CheckpointReader
from pretrain.convert.weight_files import INDEX_FILE
from pretrain.errors import InputError
from pretrain.models.hugging_face import Piece, shape_of_pieces

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)

# Of a large tensor so much is read at once, in float32; and what was read of a checkpoint's file counts as this
# process's memory until it is closed.
_BYTES_READ_AT_ONCE = 32 * 2**20


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``5GB``, ``500MB`` (powers of 1000), ``2GiB`` (of 1024) or ``1000000``.

    Raises:
        InputError: it is none, or less than a byte.
    """
    match = _SIZE.fullmatch(str(text))
    unit = None if match is None else _UNITS.get(match[2].upper() or "B")
    size = 0 if match is None or unit is None else int(float(match[1]) * unit)
    if size < 1:
        raise InputError(f"--max-shard-size must be a size such as 5GB, 500MB or 2GiB, but is {text!r}")
    return size


@dataclass(frozen=True)
class OutgoingWeights:
    """The weights of a checkpoint in the names of a Hugging Face class.

    Attributes:
        reader: the checkpoint.
        shapes: of our parameters, by global name.
        pieces: tensor -> our parameters that it is made of, in order.
        dtype: of all tensors but those of ``float32``.
        float32: parameters whose tensors are float32 whatever ``dtype`` is.
    """

    reader: CheckpointReader
    shapes: Mapping[str, tuple[int, ...]]
    pieces: Mapping[str, Mapping[str, Piece]]
    dtype: torch.dtype
    float32: frozenset[str]

    def write(self, directory: Path, max_shard_size: int) -> int:
        """Writes ``model.safetensors``, or where that would be larger than ``max_shard_size``, shards and their index.

        Holds one shard and a part of one tensor at a time. A tensor larger than ``max_shard_size`` has a shard of its
        own.

        Returns:
            Number of weight files.

        Raises:
            InputError: the checkpoint is damaged, or a file cannot be written.
        """
        # Without memory; the library knows how the hub splits and names files.
        empty = {name: self._empty(pieces) for name, pieces in self.pieces.items()}
        split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
        sizes = {
            file: sum(_aligned(empty[name].nbytes) for name in names)
            for file, names in split.filename_to_tensors.items()
        }
        # One for all shards: freed tensors of one would leave holes that those of the next do not fill.
        buffer = torch.empty(max(sizes.values()), dtype=torch.uint8)
        for file, names in split.filename_to_tensors.items():
            tensors, offset = {}, 0
            for name in names:
                size = empty[name].nbytes
                tensor = buffer[offset : offset + size].view(empty[name].dtype).view(empty[name].shape)
                tensors[name] = self._fill(tensor, self.pieces[name])
                offset += _aligned(size)
            _save(tensors, directory / file)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        return len(sizes)

    def rounded(self, name: str, parameter: Tensor) -> Tensor:
        """One of our parameters, float32, with the values that the files hold."""
        if name in self.float32:
            return parameter
        scale = self._scales.get(name, 1.0)
        return (parameter * scale).to(self.dtype).float() / scale

    @functools.cached_property
    def _scales(self) -> dict[str, float]:
        """By what parameters are multiplied in the files, where they are."""
        placed = (place for pieces in self.pieces.values() for place in pieces.items())
        return {name: piece.scale for name, piece in placed if piece.scale != 1}

    def _empty(self, pieces: Mapping[str, Piece]) -> Tensor:
        dtype = torch.float32 if pieces.keys() <= self.float32 else self.dtype
        return torch.empty(shape_of_pieces(pieces, self.shapes), dtype=dtype, device="meta")

    def _fill(self, tensor: Tensor, pieces: Mapping[str, Piece]) -> Tensor:
        """Reads the tensor's pieces into it."""
        begin = 0
        for name, piece in pieces.items():
            rows = self.shapes[name][0]
            target = (tensor if piece.stack is None else tensor.flatten(0, 1))[begin : begin + rows]
            if piece.unsqueeze is not None:
                target = target.squeeze(piece.unsqueeze)
            for offset, length in self._slices(name):
                part = self.reader.read(name, dimension=0, offset=offset, length=length)
                target[offset : offset + length].copy_(part if piece.scale == 1 else part * piece.scale)
            begin += rows
        return tensor

    def _slices(self, name: str) -> Iterator[tuple[int, int]]:
        """Offsets and lengths of a parameter's rows that are read at once, and lets go of the files after each."""
        rows, *others = self.shapes[name]
        at_once = max(1, _BYTES_READ_AT_ONCE // (4 * max(1, math.prod(others))))
        for offset in range(0, rows, at_once):
            yield offset, min(at_once, rows - offset)
            self.reader.close()


def _aligned(size: int) -> int:
    """Room for so many bytes, such that another tensor of any dtype may follow."""
    return -(-size // 8) * 8


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        # Written readable by their owner alone, unlike the other files.
        shutil.copymode(path.parent / "config.json", path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path.name} cannot be written in {path.parent.parent}: {error}; make room there or give another place"
        ) from None
