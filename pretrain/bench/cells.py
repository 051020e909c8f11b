"""Problems that ``bench kernels`` times: their inputs, and the least work and traffic that they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.newton_rnn import newton_gru, newton_lstm
from pretrain.bench.contestants import Contestant

# Of the recurrent weights: the bound to which training keeps them (ParaRNN).
RECURRENT_BOUND = 0.5


@dataclass(frozen=True)
class Entry:
    """One who solves a problem.

    Attributes:
        name: of the row.
        build: makes what is timed; raises :class:`pretrain.bench.contestants.PeerMissing` where it cannot.
        is_peer: another project's code, which may fail without failing the benchmark.
    """

    name: str
    build: Callable[[], Contestant]
    is_peer: bool = False


@dataclass(frozen=True)
class Problem:
    """One task, the same for all who solve it.

    Attributes:
        kernel: the name that ``--only`` takes.
        description: its sizes but for the tokens.
        tokens: per sequence.
        flops: the least that its matrix products take, forward and backward; 0 where it has none.
        bytes: the least that is read from and written to memory, forward and backward: every input, output and
            gradient once. 0 where that limits nothing.
        entries: ours first; others are compared with it.
        note: what one must know to compare them.
    """

    kernel: str
    description: str
    tokens: int
    flops: float
    bytes: float
    entries: tuple[Entry, ...]
    note: str = ""


# By kernel: what makes its problems, each when its turn comes.
Suite = Mapping[str, Sequence[Callable[[], Problem]]]


@dataclass(frozen=True)
class Bounds:
    """How fast the machine is at what bounds every cell.

    Attributes:
        product: a matrix product, of ``flops``.
        copy: of a tensor larger than any cache; ``bytes`` are read and written together.
    """

    product: Contestant
    flops: float
    copy: Contestant
    bytes: float


class Draw:
    """Random tensors, one after the other from one seed, of one dtype on one device."""

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """``shift + scale * N(0, 1)``."""
        drawn = torch.randn(*shape, generator=self.generator, device=self.device)
        return (shift + scale * drawn).to(self.dtype)


def forward_and_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor] = ()
) -> Contestant:
    """``function(*inputs)``, and the gradients for a random gradient of its output.

    Args:
        function: what to time.
        inputs: its arguments.
        weights: what it holds itself that gradients are wanted of too.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    gradient: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        output = function(*inputs)
        if not gradient:
            gradient.append(Draw(output.device, output.dtype, seed=1)(*output.shape))
        return (output, *torch.autograd.grad(output, (*inputs, *weights), gradient))

    return Contestant("", run, lambda: None, 0)


def mlstm_inputs(batch: int, heads: int, tokens: int, query_key: int, value: int, draw: Draw) -> list[Tensor]:
    """Queries, keys and values of unit variance; gates that write little and remember, as after training starts."""
    leading = (batch, tokens, heads)
    vectors = [draw(*leading, size) for size in (query_key, query_key, value)]
    return [*vectors, draw(*leading, shift=-2.0), draw(*leading, shift=4.0)]


def mlstm_flops(batch: int, heads: int, tokens: int, query_key: int, value: int) -> float:
    """Of the step-by-step form, which no form undercuts: write and read the memory, three times for a backward."""
    return 3.0 * batch * heads * tokens * (4 * query_key * value + 4 * query_key)


def mlstm_bytes(batch: int, heads: int, tokens: int, query_key: int, value: int, element: int) -> float:
    """Forward: queries, keys, values, outputs; backward: those, the outputs' gradients, and the gradients."""
    return float(element * batch * heads * tokens * ((2 * query_key + 2 * value) + (4 * query_key + 3 * value)))


@dataclass(frozen=True)
class NewtonCell:
    """ParaGRU or ParaLSTM.

    Attributes:
        kernel: its name.
        function: of :mod:`kernels.newton_rnn`.
        weights: numbers of rows of each tensor of recurrent weights.
        states: numbers of recurrent state per channel.
    """

    kernel: str
    function: Callable[..., Any]
    weights: tuple[int, ...]
    states: int

    def inputs(self, batch: int, tokens: int, channels: int, draw: Draw) -> list[Tensor]:
        """Gates of unit variance, recurrent weights over the whole range that training keeps them in."""
        gates = draw(batch, tokens, 3, channels)
        weights = [draw(rows, channels, scale=0.2) for rows in self.weights]
        return [gates, *(weight.clamp(-RECURRENT_BOUND, RECURRENT_BOUND) for weight in weights)]

    def bytes(self, batch: int, tokens: int, channels: int, element: int) -> float:
        """Forward: gates, states; backward: both, the output's gradient, the gates' gradient."""
        return float(element * batch * tokens * channels * ((3 + self.states) + (3 + self.states + 1 + 3)))

    def contestant(self, inputs: list[Tensor], backend: str) -> Contestant:
        return forward_and_backward(lambda *tensors: self.function(*tensors, backend=backend)[0], inputs)


NEWTON_CELLS = (NewtonCell("para_gru", newton_gru, (3,), 1), NewtonCell("para_lstm", newton_lstm, (3, 2), 2))


def slstm_flops(batch: int, heads: int, tokens: int, size: int) -> float:
    """The product of each hidden state but the last with the recurrent weights, three times for a backward."""
    return 3.0 * 8 * batch * heads * (tokens - 1) * size**2


def slstm_bytes(batch: int, heads: int, tokens: int, size: int, element: int) -> float:
    """Forward: four gates and an output; backward: those, the output's gradient, the gates' gradients."""
    return float(element * batch * heads * tokens * size * ((4 + 1) + (4 + 1 + 1 + 4)))


def slstm_inputs(batch: int, heads: int, tokens: int, size: int, draw: Draw) -> list[Tensor]:
    """Gates of unit variance, recurrent weights that keep a unit's variance, forget gates that remember."""
    gates = draw(batch, tokens, 4, heads, size)
    recurrent = draw(4, heads, size, size, scale=size**-0.5)
    bias = draw(4, heads, size, scale=0.1)
    bias[1] += 3.0
    return [gates, recurrent, bias]
