"""Messages between the ranks that hold segments of the same sequences, counted as they are sent."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

SCHEMES = ("gather", "scan")


class Traffic:
    """What a rank has received from others: messages and bytes, by kind of call.

    A kind is ``"gather"`` (everything from everyone), ``"sum"`` (its gradient: a part from everyone) or ``"shift"``
    (from one neighbour, near or far).
    """

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, kind: str, messages: int, size: int) -> None:
        """Counts ``messages`` of ``size`` bytes each."""
        self.messages[kind] += messages
        self.bytes[kind] += messages * size

    def clear(self) -> None:
        """Counts from zero again."""
        self.messages.clear()
        self.bytes.clear()


class Segments:
    """This rank's place among those that hold a sequence, in order; a subclass carries the messages.

    Every rank makes the same calls in the same order, forward and backward.

    Attributes:
        rank, size: place of this rank's segment, and how many there are.
        scheme: how states are put together, ``"gather"`` or ``"scan"``; see :func:`kernels.segments.parts_before`.
        traffic: what was received so far.
    """

    def __init__(self, rank: int, size: int, scheme: str = "gather"):
        if scheme not in SCHEMES:
            raise ValueError(f"segments: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}.")
        self.rank, self.size, self.scheme = rank, size, scheme
        self.traffic = Traffic()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """``(size, *shape)``: this tensor of every rank, all of one shape. Outside autograd."""
        self.traffic.add("gather", self.size - 1, tensor.numel() * tensor.element_size())
        return self._all_gather(tensor.detach().contiguous())

    def sum_parts(self, parts: Tensor) -> Tensor:
        """Of ``parts`` (size, *shape) the r-th goes to rank r; the sum of what arrives here. Outside autograd."""
        self.traffic.add("sum", self.size - 1, parts[0].numel() * parts.element_size())
        return self._all_to_all(parts.detach().contiguous()).sum(0)

    def shift(self, tensor: Tensor, distance: int, first: int = 0, back: bool = False) -> Tensor | None:
        """Every rank from ``first`` on sends its tensor to the one ``distance`` further on. Outside autograd.

        Args:
            back: the same pairs of ranks, and the other way: gradients of what was sent.

        Returns:
            What arrives, of the tensor's shape; None where nothing does.
        """
        source = self.rank - distance if self.rank - distance >= first else None
        target = self.rank + distance if self.rank >= first and self.rank + distance < self.size else None
        if back:
            source, target = target, source
        if source is not None:
            self.traffic.add("shift", 1, tensor.numel() * tensor.element_size())
        return self._send_and_receive(tensor.detach().contiguous(), target, source)

    def _send_and_receive(self, tensor: Tensor, target: int | None, source: int | None) -> Tensor | None:
        raise NotImplementedError(f"{type(self).__name__} must carry messages")

    def _all_gather(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must carry messages")

    def _all_to_all(self, parts: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must carry messages")

    def gathered(self, tensor: Tensor) -> Tensor:
        """As :meth:`all_gather`, with gradients; every rank must use the result in what it differentiates."""
        return _Gathered.apply(tensor, self)

    def from_previous(self, tensor: Tensor) -> Tensor:
        """The previous rank's tensor, zeros on the first; with gradients, and to be used as in :meth:`gathered`."""
        return _FromPrevious.apply(tensor, self)


class ProcessSegments(Segments):
    """Segments on the processes of a group, in the order of their ranks."""

    def __init__(self, group: dist.ProcessGroup, scheme: str = "gather"):
        super().__init__(dist.get_rank(group), dist.get_world_size(group), scheme)
        self.group = group
        self.ranks = dist.get_process_group_ranks(group)
        # NCCL wants all ranks in the first call of a group, and a shift leaves some out.
        dist.barrier(group=group)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(gathered.unbind()), tensor, group=self.group)
        return gathered

    def _all_to_all(self, parts: Tensor) -> Tensor:
        arrived = torch.empty_like(parts)
        dist.all_to_all_single(arrived, parts, group=self.group)
        return arrived

    def _send_and_receive(self, tensor: Tensor, target: int | None, source: int | None) -> Tensor | None:
        arrived = None if source is None else torch.empty_like(tensor)
        messages = []
        if target is not None:
            messages.append(dist.P2POp(dist.isend, tensor, self.ranks[target], group=self.group))
        if arrived is not None:
            messages.append(dist.P2POp(dist.irecv, arrived, self.ranks[source], group=self.group))
        for work in dist.batch_isend_irecv(messages) if messages else ():
            work.wait()
        return arrived


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return segments.all_gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Many ranks' gradients add up: in float32, whatever was sent.
        summed = ctx.segments.sum_parts(gradient.float() if gradient.itemsize < 4 else gradient)
        return summed.to(gradient.dtype), None


class _FromPrevious(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        arrived = segments.shift(tensor, 1)
        return torch.zeros_like(tensor) if arrived is None else arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        arrived = ctx.segments.shift(gradient, 1, back=True)
        return torch.zeros_like(gradient) if arrived is None else arrived, None
