"""Messages between the ranks that hold segments of the same sequences, counted as they are sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

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


class Arriving:
    """A tensor that other ranks are sending, while this one goes on."""

    def __init__(self, tensor: Tensor | None, works: Iterable[dist.Work] = ()):
        self._tensor, self._works = tensor, list(works)

    def wait(self) -> Tensor | None:
        """The tensor, once it is here; None where nothing was sent to this rank."""
        for work in self._works:
            work.wait()
        self._works = []
        return self._tensor


class Segments:
    """This rank's place among those that hold a sequence, in order; a subclass carries the messages.

    Every rank makes the same calls in the same order, forward and backward. Those that begin with ``start`` do not
    wait: what they return is asked for the result later. All are outside autograd; ``kernels.segments.Told`` has
    gradients.

    Attributes:
        rank, size: place of this rank's segment, and how many there are.
        scheme: how states are put together, ``"gather"`` or ``"scan"``; see :class:`kernels.segments.PartsTold`.
        traffic: what was received so far.
    """

    def __init__(self, rank: int, size: int, scheme: str = "gather"):
        if scheme not in SCHEMES:
            raise ValueError(f"segments: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}.")
        self.rank, self.size, self.scheme = rank, size, scheme
        self.traffic = Traffic()

    def start_all_gather(self, tensor: Tensor) -> Arriving:
        """``(size, *shape)``: this tensor of every rank, all of one shape."""
        self.traffic.add("gather", self.size - 1, tensor.numel() * tensor.element_size())
        return self._all_gather(tensor.detach().contiguous())

    def all_gather(self, tensor: Tensor) -> Tensor:
        """As :meth:`start_all_gather`, waiting."""
        return self.start_all_gather(tensor).wait()

    def start_all_to_all(self, parts: Tensor) -> Arriving:
        """Of ``parts`` (size, *shape) the r-th goes to rank r; ``(size, *shape)``, what arrives here of every rank."""
        self.traffic.add("sum", self.size - 1, parts[0].numel() * parts.element_size())
        return self._all_to_all(parts.detach().contiguous())

    def start_shift(self, tensor: Tensor, distance: int, first: int = 0, back: bool = False) -> Arriving:
        """Every rank from ``first`` on sends its tensor to the one ``distance`` further on.

        Args:
            back: the same pairs of ranks, and the other way: gradients of what was sent.

        Returns:
            What arrives, of the tensor's shape; nothing where no rank is so far in front.
        """
        source = self.rank - distance if self.rank - distance >= first else None
        target = self.rank + distance if self.rank >= first and self.rank + distance < self.size else None
        if back:
            source, target = target, source
        if source is not None:
            self.traffic.add("shift", 1, tensor.numel() * tensor.element_size())
        return self._send_and_receive(tensor.detach().contiguous(), target, source)

    def shift(self, tensor: Tensor, distance: int, first: int = 0, back: bool = False) -> Tensor | None:
        """As :meth:`start_shift`, waiting."""
        return self.start_shift(tensor, distance, first, back).wait()

    def _send_and_receive(self, tensor: Tensor, target: int | None, source: int | None) -> Arriving:
        raise NotImplementedError(f"{type(self).__name__} must carry messages")

    def _all_gather(self, tensor: Tensor) -> Arriving:
        raise NotImplementedError(f"{type(self).__name__} must carry messages")

    def _all_to_all(self, parts: Tensor) -> Arriving:
        raise NotImplementedError(f"{type(self).__name__} must carry messages")


class ProcessSegments(Segments):
    """Segments on the processes of a group, in the order of their ranks.

    A GPU sends and receives on a stream of its own (NCCL), a CPU on a thread (gloo), while the rank computes.
    """

    def __init__(self, group: dist.ProcessGroup, scheme: str = "gather"):
        super().__init__(dist.get_rank(group), dist.get_world_size(group), scheme)
        self.group = group
        self.ranks = dist.get_process_group_ranks(group)
        # NCCL wants all ranks in the first call of a group, and a shift leaves some out.
        dist.barrier(group=group)

    def _all_gather(self, tensor: Tensor) -> Arriving:
        gathered = tensor.new_empty(self.size, *tensor.shape)
        return Arriving(gathered, [dist.all_gather(list(gathered.unbind()), tensor, group=self.group, async_op=True)])

    def _all_to_all(self, parts: Tensor) -> Arriving:
        arrived = torch.empty_like(parts)
        return Arriving(arrived, [dist.all_to_all_single(arrived, parts, group=self.group, async_op=True)])

    def _send_and_receive(self, tensor: Tensor, target: int | None, source: int | None) -> Arriving:
        arrived = None if source is None else torch.empty_like(tensor)
        messages = []
        if target is not None:
            messages.append(dist.P2POp(dist.isend, tensor, self.ranks[target], group=self.group))
        if arrived is not None:
            messages.append(dist.P2POp(dist.irecv, arrived, self.ranks[source], group=self.group))
        return Arriving(arrived, dist.batch_isend_irecv(messages) if messages else ())
