"""One sequence over several ranks: each holds a segment, and states go from rank to rank, layer by layer.

What a rank hands the next is what a mixer hands its next call anyway, its state. So every mixer, nonlinear recurrences
and any mix of mixers among them, gives the result and the gradients of one rank, and a message is as large as a state,
however long the segments are.

Ranks do not take turns: while one computes a layer, the one before it computes the layer above. Of L layers over P
ranks a pass takes (L + P - 1) / L times as long as an even split of the work. Gradients of states go the other way
in the backward pass, in which the last rank begins.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.segments import Traffic
from pretrain.models.mixer import SequenceMixer, State


class SegmentChain:
    """This rank's place in the chain of ranks that hold a sequence; messages on the way to its neighbours."""

    def __init__(self) -> None:
        self.group = parallel_state.get_context_parallel_group()
        ranks, place = dist.get_process_group_ranks(self.group), parallel_state.get_context_parallel_rank()
        self.previous = ranks[place - 1] if place > 0 else None
        self.next = ranks[place + 1] if place + 1 < len(ranks) else None
        self.traffic = Traffic()
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def receive_state(self, mixer: SequenceMixer, hidden: Tensor) -> State | None:
        """The state before this segment, whose gradient goes back to the rank before; None on the first rank.

        Args:
            mixer: that the state belongs to.
            hidden: ``(sequence, batch, hidden_size)``, its input, for batch size, device and place in the graph.
        """
        if self.previous is None:
            return None
        first = mixer.initial_state(hidden.shape[1], hidden.device)
        growing = _growing(mixer)
        # In the order in which the mixer declares them.
        shapes = {name: list(first[name].shape) for name in mixer.state_tensors()}
        if growing:
            sizes = torch.empty(len(growing), dtype=torch.int64, device=hidden.device)
            self.receive(sizes, self.previous)
            for (name, dimension), size in zip(growing, sizes.tolist(), strict=True):
                shapes[name][dimension] = size
        flat = _Incoming.apply(hidden, self, sum(map(math.prod, shapes.values())))
        parts = flat.split([math.prod(shape) for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def send_state(self, mixer: SequenceMixer, hidden: Tensor, state: State) -> Tensor:
        """Sends the state behind this segment, and returns ``hidden``, through which its gradient finds back."""
        if self.next is None:
            return hidden
        growing = _growing(mixer)
        if growing:
            sizes = [state[name].shape[dimension] for name, dimension in growing]
            self.send(torch.tensor(sizes, dtype=torch.int64, device=hidden.device), self.next)
        flat = torch.cat([state[name].flatten() for name in mixer.state_tensors()])
        return _Outgoing.apply(hidden, flat, self)

    def send(self, tensor: Tensor, rank: int) -> None:
        """Sends without waiting; ``tensor`` must not change before :meth:`finish`."""
        self._sent.append((dist.isend(tensor, rank, group=self.group), tensor))

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Fills ``tensor`` with the next message from a neighbour."""
        dist.recv(tensor, rank, group=self.group)
        self.traffic.add("sizes" if tensor.dtype == torch.int64 else "state", 1, tensor.numel() * tensor.element_size())

    def finish(self) -> None:
        """Waits until all that was sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []


def _growing(mixer: SequenceMixer) -> list[tuple[str, int]]:
    """Dimensions of the state that grow with the tokens read, whose size is sent ahead."""
    return [
        (name, dimension)
        for name, declared in mixer.state_tensors().items()
        for dimension, size in enumerate(declared.shape, start=1)
        if size is None
    ]


class _Incoming(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, chain: SegmentChain, size: int) -> Tensor:
        ctx.chain = chain
        flat = torch.empty(size, dtype=torch.float32, device=hidden.device)
        chain.receive(flat, chain.previous)
        return flat

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[None, None, None]:
        ctx.chain.send(gradient.contiguous(), ctx.chain.previous)
        return None, None, None


class _Outgoing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, flat: Tensor, chain: SegmentChain) -> Tensor:
        ctx.chain, ctx.size = chain, flat.numel()
        chain.send(flat.detach(), chain.next)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        flat = torch.empty(ctx.size, dtype=torch.float32, device=gradient.device)
        ctx.chain.receive(flat, ctx.chain.next)
        return gradient, flat, None
