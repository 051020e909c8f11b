"""Messages between segments that have gradients, and that a rank need not wait for."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.segments.communication import Arriving, Segments


class Told:
    """A tensor on its way to other ranks, and theirs on the way to this one.

    What is computed between making it and :meth:`take` hides the messages, if it does not need them; in the backward
    pass the gradients of that same work hide those of the messages. Every rank makes one and takes it, and uses what
    it took in what it differentiates.

    Args:
        segments: where this rank's segment stands.
        tensor: of one shape on all ranks, which may go on being read, and must not be written to.
        to: ``"everyone"``: :meth:`take` returns ``(size, *shape)``, every rank's; ``"next"``: the previous rank's,
            zeros on the first.
    """

    def __init__(self, segments: Segments, tensor: Tensor, to: Literal["everyone", "next"]):
        self.segments, self.to = segments, to
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.arriving: Arriving | None = None
        self.returning: Arriving | None = None
        # Leads gradients from what is taken to what was told.
        self.thread: Tensor | None = _Tell.apply(tensor, self)

    def take(self) -> Tensor:
        """What other ranks told, once it is here; once only."""
        thread, self.thread = self.thread, None
        return _Take.apply(thread, self)


class _Tell(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, told: Told) -> Tensor:
        ctx.told = told
        if told.to == "everyone":
            told.arriving = told.segments.start_all_gather(tensor)
        else:
            told.arriving = told.segments.start_shift(tensor, 1)
        return tensor.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, thread: Tensor) -> tuple[Tensor, None]:
        told = ctx.told
        gradient, told.returning = told.returning.wait(), None
        if gradient is None:
            gradient = thread.new_zeros(told.shape)
        elif told.to == "everyone":
            gradient = gradient.sum(0)
        return gradient.to(told.dtype), None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, thread: Tensor, told: Told) -> Tensor:
        ctx.told = told
        arrived, told.arriving = told.arriving.wait(), None
        return thread.new_zeros(told.shape) if arrived is None else arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        told = ctx.told
        if told.to == "everyone":
            # Many ranks' gradients add up: in float32, whatever was sent.
            sent = gradient.float() if gradient.itemsize < 4 else gradient
            told.returning = told.segments.start_all_to_all(sent)
        else:
            told.returning = told.segments.start_shift(gradient, 1, back=True)
        return gradient.new_zeros(()), None
