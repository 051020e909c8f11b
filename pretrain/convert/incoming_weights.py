"""Tensors of a native class as our parameters: the way back of ``NativeClass.tensors``, by the same tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.shards import TensorPiece
from pretrain.config.model import ModelConfig
from pretrain.convert.native import NativeClass
from pretrain.convert.weight_files import READABLE_DTYPES, WeightFiles
from pretrain.errors import InputError
from pretrain.models.hugging_face import pieces_of_tensors, shape_of_pieces

Shape = tuple[int, ...]

_HEAD = "head.weight"
_ROWS_COMPARED_AT_ONCE = 4096


class IncomingWeights:
    """The weights of one model in files of a native class.

    Attributes:
        shapes: of our parameters, by global name.
        pieces: tensor there -> our parameters that it is made of, in order.
    """

    def __init__(
        self,
        native: NativeClass,
        model: ModelConfig,
        shapes: Mapping[str, Shape],
        files: WeightFiles,
        factors: Mapping[str, float],
    ):
        """Compares what the files hold with what the model needs; reads headers alone, but of a tied head.

        Args:
            shapes: of our parameters, by global name.
            factors: parameter -> by what it is multiplied beside what the class says; others by nothing.

        Raises:
            InputError: naming every tensor that is missing, too many, of another shape or of another dtype.
        """
        self.shapes, self.files, self.factors = shapes, files, factors
        self.pieces = pieces_of_tensors(native.places(model), shapes)
        expected = {tensor: shape_of_pieces(pieces, shapes) for tensor, pieces in self.pieces.items()}
        stored = files.tensors
        problems = list(files.problems)
        problems += [f"missing: {name}, {list(shape)}" for name, shape in expected.items() if name not in stored]
        for name, tensor in stored.items():
            if name not in expected:
                if not (model.tie_embeddings and name == native.names[_HEAD]):
                    problems.append(f"not of this model: {name}, {list(tensor.shape)}")
                elif not self._same(name, native.names["embedding.weight"]):
                    problems.append(f"{name} is not the embedding, though the configuration ties them")
                continue
            if tensor.shape != expected[name]:
                problems.append(f"{name} is {list(tensor.shape)}, where {list(expected[name])} is expected")
            if tensor.dtype not in READABLE_DTYPES:
                problems.append(f"{name} is {tensor.dtype}, where one of {', '.join(READABLE_DTYPES)} is expected")
        if problems:
            lines = "".join(f"\n  {problem}" for problem in problems)
            raise InputError(f"{files.directory}: the weights are not those that config.json describes:{lines}")

    def __iter__(self) -> Iterator[TensorPiece]:
        """Our parameters, one after the other, each read when it is asked for."""
        for tensor, pieces in self.pieces.items():
            offset = 0
            for name, piece in pieces.items():
                length = self.shapes[name][0]
                part = self._rows(tensor, offset, length, piece.stack) if len(pieces) > 1 else self.files.read(tensor)
                if piece.unsqueeze is not None:
                    part = part.squeeze(piece.unsqueeze)
                offset += length
                factor = self.factors.get(name, 1.0) / piece.scale
                yield TensorPiece(name, "weight", part if factor == 1 else part * factor, self.shapes[name])

    def _rows(self, tensor: str, offset: int, length: int, stack: int | None) -> Tensor:
        """Rows of a stored tensor; where it is a stack of groups, of all groups one after the other."""
        if stack is None:
            return self.files.read(tensor, offset, length)
        group, row = divmod(offset, self.files.tensors[tensor].shape[1])
        return self.files.read(tensor, group, 1)[0, row : row + length].contiguous()

    def _same(self, name: str, other: str) -> bool:
        """Whether two stored tensors are equal, compared some rows at a time."""
        one, two = self.files.tensors[name], self.files.tensors.get(other)
        if two is None or one.shape != two.shape or not one.shape:
            return False
        for row in range(0, one.shape[0], _ROWS_COMPARED_AT_ONCE):
            length = min(_ROWS_COMPARED_AT_ONCE, one.shape[0] - row)
            if not torch.equal(self.files.read(name, row, length), self.files.read(other, row, length)):
                return False
        return True


def check_size(parameters: int, files: WeightFiles, config_file: Path) -> None:
    """Raises ``InputError`` where a model is far larger than its files, so that nothing of that size is ever built."""
    if parameters > 2 * files.elements:
        raise InputError(
            f"{config_file}: describes a model of {parameters:,} parameters, but the weight files hold only "
            f"{files.elements:,}"
        )
