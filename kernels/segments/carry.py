"""The state before a segment, put together from what every earlier segment does to a state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.segments.communication import Segments

Parts = tuple[Tensor, ...]
# What two segments, the earlier one first, come to together; associative, in differentiable torch.
Combine = Callable[[Parts, Parts], Parts]


def parts_before(parts: Sequence[Tensor], combine: Combine, segments: Segments) -> Parts:
    """What all segments before this rank's come to; zeros, of which nothing is in front, on the first rank.

    Two schemes, with the same result but for rounding. ``"gather"``: every rank gets what every other has, in one
    call, and combines what is before it: ``(size - 1) M`` bytes for summaries of M. ``"scan"``: after ``n`` rounds a
    rank has combined the last ``2^n`` segments before it (Hillis and Steele 1986, "Data parallel algorithms"), in
    ``1 + ceil(log2(size - 1))`` messages of M. Gradients go the same ways back, and are as many bytes.

    Args:
        parts: summary of this rank's segment, all of one dtype, of the same shapes on all ranks. Zeros must be what
            no segment at all comes to.
        combine: two summaries to one.

    Returns:
        As ``parts``. Every rank, the first one too, must use it in what it differentiates.
    """
    shapes = [part.shape for part in parts]
    flat = torch.cat([part.flatten() for part in parts])
    return _unpacked(_PartsBefore.apply(flat, shapes, combine, segments), shapes)


def _unpacked(flat: Tensor, shapes: Sequence[torch.Size]) -> Parts:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


class _PartsBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, shapes: list[torch.Size], combine: Combine, segments: Segments) -> Tensor:
        ctx.segments = segments

        def combined(earlier: Tensor, later: Tensor) -> Tensor:
            both = combine(_unpacked(earlier, shapes), _unpacked(later, shapes))
            return torch.cat([part.flatten() for part in both])

        ctx.combined = combined
        nothing = torch.zeros_like(flat)
        if segments.scheme == "gather":
            gathered = segments.all_gather(flat)
            before = nothing
            for piece in gathered[: segments.rank]:
                before = combined(before, piece)
            ctx.save_for_backward(gathered)
            return before
        own = segments.shift(flat, 1)
        pairs: list[Tensor] = []
        for distance in _distances(segments.size):
            # Nothing is before the first rank, so that from the second on each has something to send.
            earlier = segments.shift(nothing if own is None else own, distance, first=1)
            if earlier is not None:
                pairs += [earlier, own]
                own = combined(earlier, own)
        if own is not None:
            pairs.append(own)
            own = combined(nothing, own)
        ctx.save_for_backward(*pairs)
        return nothing if own is None else own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        segments = ctx.segments
        if segments.scheme == "gather":
            (gathered,) = ctx.saved_tensors
            gradients = torch.zeros_like(gathered)
            if segments.rank:
                with torch.enable_grad():
                    pieces = [piece.requires_grad_() for piece in gathered[: segments.rank].clone().unbind()]
                    before = torch.zeros_like(gradient)
                    for piece in pieces:
                        before = ctx.combined(before, piece)
                gradients[: segments.rank] = torch.stack(torch.autograd.grad(before, pieces, gradient))
            return segments.sum_parts(gradients), None, None, None
        (*pairs,) = ctx.saved_tensors
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
        arrived = segments.shift(gradient, 1, back=True)
        return torch.zeros_like(gradient) if arrived is None else arrived, None, None, None


def _distances(size: int) -> list[int]:
    """How far the messages of each round of the scan go; the second rank's segment has only the first in front."""
    return [1 << power for power in range((size - 2).bit_length())] if size > 2 else []


def _gradients(
    combined: Callable[[Tensor, Tensor], Tensor], earlier: Tensor, later: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of both arguments of ``combined``."""
    pair = earlier.detach().requires_grad_(), later.detach().requires_grad_()
    with torch.enable_grad():
        result = combined(*pair)
    return torch.autograd.grad(result, pair, gradient)
