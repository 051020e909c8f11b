"""Layers that ``bench context`` times: each as it is on its own, and with all-to-all over heads, as Megatron has it.

All-to-all is the peer: before a layer's work along the sequence each rank gives up all heads but its own, and has the
whole sequence of these in return; behind it they change back. It needs as many heads as ranks, and what it sends grows
with the sequence. Its messages are Megatron-core's own functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp, all_to_all_sp2hp
from torch import Tensor, nn

from kernels.conv1d import causal_conv1d
from kernels.mlstm import MLSTMState, mlstm
from kernels.mlstm.segments import start_exchange as start_mlstm_exchange
from kernels.newton_rnn import newton_gru
from kernels.segments import Segments, Traffic
from kernels.ssd import ssd
from kernels.ssd.segments import start_exchange as start_ssd_exchange
from pretrain.models.attention.attend import attend
from pretrain.models.attention.config import AttentionConfig
from pretrain.models.attention.mixer import Attention
from pretrain.models.attention.rotary import angles, rotate
from pretrain.models.mixer import Documents, LayerContext, SequenceMixer, State, StateTensor
from pretrain.models.para_gru.config import ParaGRUConfig
from pretrain.models.para_gru.mixer import ParaGRU
from pretrain.models.parameters import ParameterSpec, constant, evenly_spaced, new_parameter


@dataclass(frozen=True)
class Sizes:
    """Sizes of all layers; each has one sequence.

    Attributes:
        hidden_size: of attention and ParaGRU.
        heads: of every layer.
        head_size: of the mLSTM's values and Mamba-2's; the mLSTM's queries and keys have half of it.
        state_size, groups: of Mamba-2.
    """

    hidden_size: int = 256
    heads: int = 4
    head_size: int = 64
    state_size: int = 64
    groups: int = 4

    def whole_heads(self, ranks: int) -> bool:
        """Whether each rank can have heads of its own."""
        return self.heads % ranks == 0 and self.groups % ranks == 0


class HeadExchange:
    """This rank's place in the all-to-all over heads; counts what it receives, forward and backward."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.traffic = group, Traffic()
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def own(self, count: int) -> slice:
        """This rank's of so many heads or channels."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def to_heads(self, segment: Tensor) -> Tensor:
        """(sequence / ranks, batch, channels) to (sequence, batch, channels / ranks)."""
        self._count(segment)
        return all_to_all_sp2hp(segment, self.group).unflatten(0, (-1, segment.shape[1]))

    def to_segments(self, heads: Tensor) -> Tensor:
        """(sequence, batch, channels / ranks) to (sequence / ranks, batch, channels)."""
        self._count(heads)
        return all_to_all_hp2sp(heads, self.group).unflatten(0, (-1, heads.shape[1]))

    def _count(self, tensor: Tensor) -> None:
        part = tensor.numel() * tensor.element_size() // self.size
        self.traffic.add("all_to_all", 2 * (self.size - 1), part)


class Layer(SequenceMixer):
    """A layer that can also do its work by heads."""

    def by_heads(self, segment: Tensor, exchange: HeadExchange) -> Tensor:
        """Output of this rank's segment, (sequence / ranks, batch, channels), no state before the first."""
        raise NotImplementedError(f"{type(self).__name__} must say how its heads are spread over ranks")


class MLSTMCell(Layer):
    """The mLSTM's recurrence alone; each head's query, key, value and two gates stand side by side in its input."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.split = [sizes.head_size // 2, sizes.head_size // 2, sizes.head_size, 1, 1]
        self.channels = sizes.heads * sum(self.split)
        self.states = {
            "matrix": StateTensor((sizes.heads, *self.split[1:3]), None),
            "normalizer": StateTensor((sizes.heads, self.split[1]), None),
            "stabilizer": StateTensor((sizes.heads,), None),
        }

    def state_tensors(self) -> dict[str, StateTensor]:
        return self.states

    def forward(
        self, hidden: Tensor, state: State | Segments | None, documents: Documents | None
    ) -> tuple[Tensor, State]:
        by_head = hidden.transpose(0, 1).unflatten(-1, (-1, sum(self.split)))
        query, key, value, input_gate, forget_gate = by_head.split(self.split, -1)
        # Written weakly and kept long, as after a training's start.
        written = (key, value, input_gate[..., 0] - 2.0, forget_gate[..., 0] + 4.0)
        if isinstance(state, Segments):
            initial = start_mlstm_exchange(state, *written, None)()
        else:
            initial = None if state is None else MLSTMState(**state)
        cell, final = mlstm(query, *written, initial_state=initial)
        return cell.transpose(0, 1).flatten(2), final._asdict()

    def by_heads(self, segment: Tensor, exchange: HeadExchange) -> Tensor:
        return exchange.to_segments(self(exchange.to_heads(segment), None, None)[0])


class Mamba2Cell(Layer):
    """Mamba-2's recurrence alone; its input holds each head's values and step size, then each group's keys, queries."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.head_size, self.state_size = sizes.head_size, sizes.state_size
        self.split = [sizes.heads * (sizes.head_size + 1), sizes.groups * 2 * sizes.state_size]
        self.channels = sum(self.split)
        rates = ParameterSpec(evenly_spaced(0.0, math.log(16.0)))
        self.log_decay_rate = new_parameter((sizes.heads,), rates)
        self.skip = new_parameter((sizes.heads,), ParameterSpec(constant(1.0)))
        self.states = {"matrix": StateTensor((sizes.heads, sizes.head_size, sizes.state_size), None)}

    def state_tensors(self) -> dict[str, StateTensor]:
        return self.states

    def _recurrence(
        self, heads: Tensor, groups: Tensor, own: slice, state: State | Segments | None
    ) -> tuple[Tensor, State]:
        by_head = heads.transpose(0, 1).unflatten(-1, (-1, self.head_size + 1))
        values, step = by_head.split([self.head_size, 1], -1)
        keys, queries = groups.transpose(0, 1).unflatten(-1, (-1, 2 * self.state_size)).chunk(2, -1)
        # Between the 0.001 and 0.1 that a training starts from.
        step = nn.functional.softplus(step[..., 0] - 4.0)
        written = (values, step, -torch.exp(self.log_decay_rate[own]), keys)
        initial = state["matrix"] if isinstance(state, dict) else None
        if isinstance(state, Segments):
            initial = start_ssd_exchange(state, *written, None)()
        recurrent, final = ssd(*written, queries, skip=self.skip[own], initial_state=initial)
        return recurrent.transpose(0, 1).flatten(2), {"matrix": final}

    def forward(
        self, hidden: Tensor, state: State | Segments | None, documents: Documents | None
    ) -> tuple[Tensor, State]:
        return self._recurrence(*hidden.split(self.split, -1), slice(None), state)

    def by_heads(self, segment: Tensor, exchange: HeadExchange) -> Tensor:
        heads, groups = (exchange.to_heads(part) for part in segment.split(self.split, -1))
        own = exchange.own(len(self.skip))
        return exchange.to_segments(self._recurrence(heads, groups, own, None)[0])


class ParaGRULayer(ParaGRU, Layer):
    """The whole mixer; by heads its convolution, gates and recurrence, between the projections."""

    def __init__(self, sizes: Sizes, context: LayerContext):
        super().__init__(ParaGRUConfig(num_heads=sizes.heads), context)
        self.channels = sizes.hidden_size

    def by_heads(self, segment: Tensor, exchange: HeadExchange) -> Tensor:
        inputs, output_gate = self.projections(segment)
        heads, channels = exchange.own(self.local_heads), exchange.own(inputs.shape[-1])
        convolved, _ = causal_conv1d(
            exchange.to_heads(inputs).transpose(0, 1),
            self.convolution_weight[channels],
            self.convolution_bias[channels],
            activation="silu",
        )
        by_head = convolved.unflatten(-1, (-1, self.head_size))
        gates = torch.einsum("bths,hsgr->btghr", by_head, self.input_map[heads]).flatten(3) + self.bias[:, channels]
        recurrent, _, _ = newton_gru(gates, self.recurrent[:, channels])
        normed = self.norm(exchange.to_segments(recurrent.transpose(0, 1)))
        return self.output(normed * nn.functional.silu(output_gate))


class AttentionLayer(Attention, Layer):
    """The whole mixer; by heads all between the projections."""

    def __init__(self, sizes: Sizes, context: LayerContext):
        super().__init__(AttentionConfig(num_heads=sizes.heads), context)
        self.channels = sizes.hidden_size

    def by_heads(self, segment: Tensor, exchange: HeadExchange) -> Tensor:
        heads = [exchange.to_heads(part).transpose(0, 1) for part in self.projections(segment)]
        query, key, value = (part.unflatten(-1, (-1, self.head)) for part in heads)
        positions = torch.arange(query.shape[1], device=query.device)[None]
        turned = angles(positions, self.rotary_size, self.config.rotary_base)
        mixed = attend(rotate(query, *turned), rotate(key, *turned), value, None, self.scale)
        return self.output(exchange.to_segments(mixed.transpose(0, 1).flatten(2)))


@dataclass(frozen=True)
class LayerKind:
    """A layer to time.

    Attributes:
        title: what is timed.
        build: the layer from its sizes and its place in a model.
        schemes: by which its ranks can exchange what is before them; one stands for both where they are the same.
        fraction: of the tokens asked for; attention's work grows with their square.
    """

    title: str
    build: Callable[[Sizes, LayerContext], Layer]
    schemes: tuple[str, ...] = ("gather", "scan")
    fraction: int = 1


# By the name of the mixer that each belongs to.
LAYERS = {
    "mlstm": LayerKind("mLSTM, its recurrence alone", lambda sizes, context: MLSTMCell(sizes)),
    "mamba2": LayerKind("Mamba-2, its recurrence alone", lambda sizes, context: Mamba2Cell(sizes)),
    "para_gru": LayerKind("ParaGRU, whole layer", ParaGRULayer, ("gather",)),
    "attention": LayerKind("attention, whole layer", AttentionLayer, ("gather",), fraction=4),
}
