"""Copies of a checkpoint's pieces in host memory, so that training goes on while they are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pretrain.checkpoint.shards import TensorPiece

# A power of two: of pinned memory torch gives no other sizes.
_SLAB_ELEMENTS = 2**26
# Every copy begins on a cache line of its own.
_ALIGNMENT = 16


class HostCopies:
    """Memory that one save fills and the next fills again: as much as this rank writes, 4 bytes an element.

    It is taken in slabs of 256 MiB (a larger piece gets one by itself) and kept, because getting memory from the system
    takes longer than copying into it. Copies from a GPU go to pinned memory, and one synchronisation ends them all.

    Args:
        device: that the pieces are on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slabs: list[Tensor] = []
        self._slab = 0
        self._used = 0

    @property
    def num_bytes(self) -> int:
        """Host memory that is held."""
        return sum(slab.nbytes for slab in self._slabs)

    def free(self) -> None:
        """Gives the memory back; copies that were taken must be needed no more."""
        self._slabs, self._slab, self._used = [], 0, 0

    def take(self, pieces: Iterable[TensorPiece]) -> Iterator[TensorPiece]:
        """Copies every piece before it returns; those of an earlier call are overwritten.

        ``pieces`` is always drawn to its end, because gathering a piece may be a collective that other ranks wait in.

        Returns:
            The copies, on the CPU. Where a piece could not be copied they end in the error instead, so that
            ``write_checkpoint`` tells it to every rank.
        """
        self._slab = self._used = 0
        copies: list[TensorPiece] = []
        failure: Exception | None = None
        iterator = iter(pieces)
        while True:
            try:
                piece = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                failure = failure or error
                break
            if failure is not None or piece.is_empty_slice():
                continue
            try:
                copies.append(self._copy_of(piece))
            except Exception as error:  # out of host memory, for instance
                failure = error
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return _copies_or(copies, failure)

    def _copy_of(self, piece: TensorPiece) -> TensorPiece:
        # Before anything is allocated: a piece that contradicts itself is refused by its name.
        piece.record()
        target = self._room_for(piece.tensor.numel()).view(piece.tensor.shape)
        target.copy_(piece.tensor.detach(), non_blocking=True)
        return replace(piece, tensor=target)

    def _room_for(self, elements: int) -> Tensor:
        while True:
            if self._slab == len(self._slabs):
                pinned = self.device.type == "cuda"
                size = max(elements, _SLAB_ELEMENTS)
                self._slabs.append(torch.empty(size, dtype=torch.float32, pin_memory=pinned))
            slab = self._slabs[self._slab]
            if self._used + elements <= len(slab):
                start = self._used
                self._used += -(-elements // _ALIGNMENT) * _ALIGNMENT
                return slab[start : start + elements]
            self._slab, self._used = self._slab + 1, 0


def _copies_or(copies: list[TensorPiece], failure: Exception | None) -> Iterator[TensorPiece]:
    if failure is not None:
        raise failure
    yield from copies
