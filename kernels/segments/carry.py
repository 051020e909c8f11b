"""The state before a segment, put together from what every earlier segment does to a state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.segments.communication import Segments
from kernels.segments.told import Told

Parts = tuple[Tensor, ...]
# What two segments, the earlier one first, come to together; associative, in differentiable torch.
Combine = Callable[[Parts, Parts], Parts]


class PartsTold:
    """What a segment does to a state, on its way to the other ranks; theirs are asked for by :meth:`before`.

    Two schemes, with the same result but for rounding. ``"gather"``: every rank gets what every other has, in one
    call, and combines what is before it: ``(size - 1) M`` bytes for summaries of M. ``"scan"``: after ``n`` rounds a
    rank has combined the last ``2^n`` segments before it (Hillis and Steele 1986, "Data parallel algorithms"), in
    ``1 + ceil(log2(size - 1))`` messages of M. Gradients go the same ways back, and are as many bytes. What a rank
    computes between making one and :meth:`before` hides the whole of ``"gather"``, and the first message of
    ``"scan"``.

    Args:
        parts: summary of this rank's segment, all of one dtype, of the same shapes on all ranks. Zeros must be what
            no segment at all comes to.
        combine: two summaries to one.
    """

    def __init__(self, parts: Sequence[Tensor], combine: Combine, segments: Segments):
        self.shapes, self.combine, self.segments = [part.shape for part in parts], combine, segments
        flat = torch.cat([part.flatten() for part in parts])
        self.told = Told(segments, flat, "everyone" if segments.scheme == "gather" else "next")

    def before(self) -> Parts:
        """What all segments before this rank's come to; zeros, of which nothing is in front, on the first rank.

        Once only, and every rank, the first one too, must use it in what it differentiates.
        """

        def combined(earlier: Tensor, later: Tensor) -> Tensor:
            both = self.combine(_unpacked(earlier, self.shapes), _unpacked(later, self.shapes))
            return torch.cat([part.flatten() for part in both])

        before = _Gathered if self.segments.scheme == "gather" else _Scanned
        return _unpacked(before.apply(self.told.take(), combined, self.segments), self.shapes)


def _unpacked(flat: Tensor, shapes: Sequence[torch.Size]) -> Parts:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


Combined = Callable[[Tensor, Tensor], Tensor]


class _Gathered(torch.autograd.Function):
    """Of every rank's summary those in front, put together; keeps the summaries alone."""

    @staticmethod
    def forward(ctx: Any, gathered: Tensor, combined: Combined, segments: Segments) -> Tensor:
        ctx.combined, ctx.segments = combined, segments
        ctx.save_for_backward(gathered)
        return reduce(combined, gathered[: segments.rank], torch.zeros_like(gathered[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (gathered,) = ctx.saved_tensors
        rank = ctx.segments.rank
        gradients = torch.zeros_like(gathered)
        if rank:
            pieces = [piece.requires_grad_() for piece in gathered[:rank].clone().unbind()]
            with torch.enable_grad():
                before = reduce(ctx.combined, pieces, torch.zeros_like(gradient))
            gradients[:rank] = torch.stack(torch.autograd.grad(before, pieces, gradient))
        return gradients, None, None


class _Scanned(torch.autograd.Function):
    """From the summary in front to that of all segments in front, round by round."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, combined: Combined, segments: Segments) -> Tensor:
        ctx.combined, ctx.segments = combined, segments
        pairs: list[Tensor] = []
        for distance in _distances(segments.size):
            # Nothing is before the first rank, so that from the second on each has something to send.
            earlier = segments.shift(own, distance, first=1)
            if earlier is not None:
                pairs += [earlier, own]
                own = combined(earlier, own)
        if segments.rank:
            pairs.append(own)
            own = combined(torch.zeros_like(own), own)
        ctx.save_for_backward(*pairs)
        return own if segments.rank else torch.zeros_like(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        segments, pairs = ctx.segments, list(ctx.saved_tensors)
        if segments.rank:
            own = pairs.pop()
            _, gradient = _gradients(ctx.combined, torch.zeros_like(own), own, gradient)
        for distance in reversed(_distances(segments.size)):
            of_earlier = gradient
            if segments.rank > distance:
                own, earlier = pairs.pop(), pairs.pop()
                of_earlier, gradient = _gradients(ctx.combined, earlier, own, gradient)
            arrived = segments.shift(of_earlier, distance, first=1, back=True)
            if arrived is not None:
                gradient = gradient + arrived
        return gradient, None, None


def _distances(size: int) -> list[int]:
    """How far the messages of each round of the scan go; the second rank's segment has only the first in front."""
    return [1 << power for power in range((size - 2).bit_length())] if size > 2 else []


def _gradients(combined: Combined, earlier: Tensor, later: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of both arguments of ``combined``."""
    pair = earlier.detach().requires_grad_(), later.detach().requires_grad_()
    with torch.enable_grad():
        result = combined(*pair)
    return torch.autograd.grad(result, pair, gradient)
