"""The Mamba-2 mixer: projections, convolution, state-space recurrence, gated norm. Heads are split over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from torch import Generator, Tensor, nn

from kernels.conv1d import causal_conv1d
from kernels.conv1d.segments import start_exchange as start_window_exchange
from kernels.segments import Segments
from kernels.ssd import ssd
from kernels.ssd.segments import start_exchange
from pretrain.models.linear import ColumnParallelProjections, Projection, RowParallelProjection
from pretrain.models.mamba2.config import Mamba2Config
from pretrain.models.mixer import Documents, LayerContext, SequenceMixer, State, StateTensor
from pretrain.models.norm import GroupedRMSNorm
from pretrain.models.parameters import Initialiser, ParameterSpec, constant, new_parameter, uniform

# Parts of the convolved channels, in the order of the native classes.
CONVOLVED = ("value", "key", "query")


def log_of_uniform(low: float, high: float) -> Initialiser:
    """Starts from the logarithm of U(low, high)."""

    def fill(tensor: Tensor, generator: Generator) -> None:
        tensor.uniform_(low, high, generator=generator).log_()

    return fill


def inverse_softplus_of_log_uniform(low: float, high: float, floor: float) -> Initialiser:
    """Starts from values whose softplus is log-uniform in [low, high] and at least ``floor``."""

    def fill(tensor: Tensor, generator: Generator) -> None:
        step = tensor.uniform_(math.log(low), math.log(high), generator=generator).exp().clamp_min(floor)
        tensor.copy_(step + torch.log(-torch.expm1(-step)))

    return fill


class Mamba2(SequenceMixer):
    """State-space mixer (Dao and Gu 2024, arXiv 2405.21060, section 7), per token::

        z, x, k, q, d = gate(u), value(u), key(u), query(u), step_size(u)
        x, k, q       = silu(convolution([x, k, q]))
        step          = softplus(d + step_size_bias)
        H_t           = exp(-step exp(log_decay_rate)) H_{t-1} + step x_t k_t^T        per head, float32
        y             = output(group_norm((H_t q_t + skip x_t) * silu(z)))             the gate first, then the norm

    Keys and queries belong to groups of heads. Where the groups divide over the tensor-parallel ranks each rank has
    its own; else every rank computes all of them and takes those of its heads. The norm's groups are the same ones.

    First values as in the authors' code: rates log U(1, 16), step sizes log-uniform in [0.001, 0.1], torch's own
    initialisation of linear maps and convolutions, and the output's divided by the root of the number of layers.
    """

    def __init__(self, config: Mamba2Config, context: LayerContext):
        super().__init__()
        self.config = config
        width, heads = context.hidden_size, config.heads(context.hidden_size)
        inner, keys = config.inner_size(width), config.num_groups * config.state_size
        ranks = context.tensor_parallel
        self.local_heads = heads // ranks
        self.groups_are_split = config.num_groups % ranks == 0
        if not self.groups_are_split:
            first = self.local_heads * parallel_state.get_tensor_model_parallel_rank()
            group_of_head = [(first + head) * config.num_groups // heads for head in range(self.local_heads)]
            # Heads of one group stay together where that fits; else each head takes a copy of its group's.
            groups = list(dict.fromkeys(group_of_head))
            even = group_of_head == [group for group in groups for _ in range(self.local_heads // len(groups))]
            self.group_of_head = slice(groups[0], groups[-1] + 1) if even else group_of_head

        linear = uniform(-(width**-0.5), width**-0.5)
        split = ParameterSpec(linear, shard_dimension=0)
        shared = self._of_groups(linear)
        self.projections = ColumnParallelProjections(
            width,
            {
                "gate": Projection(inner, split),
                "value": Projection(inner, split),
                "key": Projection(keys, shared),
                "query": Projection(keys, shared),
                "step_size": Projection(heads, split),
            },
            context.megatron,
        )
        window = config.convolution_width
        taps = uniform(-(window**-0.5), window**-0.5)
        sizes = {"value": inner, "key": keys, "query": keys}
        for name, size in sizes.items():
            weight = ParameterSpec(taps, shard_dimension=0) if name == "value" else self._of_groups(taps)
            self.register_parameter(f"{name}_convolution_weight", new_parameter((size, window), weight))
            if config.convolution_bias:
                bias = self._of_groups(taps, weight_decay=False)
                if name == "value":
                    bias = ParameterSpec(taps, shard_dimension=0, weight_decay=False)
                self.register_parameter(f"{name}_convolution_bias", new_parameter((size,), bias))
        per_head = {
            "log_decay_rate": log_of_uniform(*config.decay_range),
            "step_size_bias": inverse_softplus_of_log_uniform(*config.step_size_range, config.step_size_floor),
            "skip": constant(1.0),
        }
        for name, initialise in per_head.items():
            spec = ParameterSpec(initialise, shard_dimension=0, weight_decay=False)
            self.register_parameter(name, new_parameter((heads,), spec))
        if config.gate_bias is not None:
            spec = ParameterSpec(constant(config.gate_bias), shard_dimension=0, weight_decay=False)
            self.gate_bias = new_parameter((inner,), spec)
        self.norm = GroupedRMSNorm(inner, config.num_groups, config.norm_epsilon)
        scale = inner**-0.5 / math.sqrt(context.num_layers)
        self.output = RowParallelProjection(
            inner, width, ParameterSpec(uniform(-scale, scale), shard_dimension=1), context.megatron
        )
        dimension = 1 if self.groups_are_split else None
        self.states = {
            "matrix": StateTensor((heads, config.head_size, config.state_size), 0),
            "value_convolution": StateTensor((window - 1, inner), 1),
            "key_convolution": StateTensor((window - 1, keys), dimension),
            "query_convolution": StateTensor((window - 1, keys), dimension),
        }

    def _of_groups(self, initialise: Initialiser, weight_decay: bool = True) -> ParameterSpec:
        """Declaration of a parameter of the groups' keys or queries."""
        if self.groups_are_split:
            return ParameterSpec(initialise, shard_dimension=0, weight_decay=weight_decay)
        return ParameterSpec(initialise, weight_decay=weight_decay, partial_gradient=True)

    def state_tensors(self) -> dict[str, StateTensor]:
        return self.states

    def _groups_of_heads(self, channels: Tensor) -> Tensor:
        """``(..., groups * state_size)`` to ``(..., groups, state_size)``, of groups that this rank's heads share."""
        groups = channels.unflatten(-1, (-1, self.config.state_size))
        if self.groups_are_split:
            return groups
        return groups[..., self.group_of_head, :]

    def _windows_before(
        self, state: State | Segments | None, channels: Tensor, starts: Tensor | None
    ) -> Callable[[], Tensor | None]:
        """What the convolution begins with, to be called when other work is done: another rank may have to send it."""
        if isinstance(state, Segments):
            return start_window_exchange(state, channels, self.config.convolution_width, starts)
        if state is None:
            return lambda: None
        return lambda: torch.cat([state[f"{name}_convolution"] for name in CONVOLVED], dim=-1)

    def _matrix_before(
        self, state: State | Segments | None, written: tuple[Tensor, ...], starts: Tensor | None
    ) -> Callable[[], Tensor | None]:
        """What the recurrence begins with, likewise."""
        if isinstance(state, Segments):
            return start_exchange(state, *written, starts)
        return lambda: None if state is None else state["matrix"]

    def forward(
        self, hidden: Tensor, state: State | Segments | None, documents: Documents | None
    ) -> tuple[Tensor, State]:
        # One convolution over values, keys and queries; each part has weights and a state of its own.
        is_segment = isinstance(state, Segments)
        (channels, step), later = self.projections.in_turn(hidden, ("gate",), apart=is_segment, joined=CONVOLVED)
        starts = None if documents is None else documents.starts
        final: State = {}
        convolved = {}
        sizes = [getattr(self, f"{name}_convolution_weight").shape[0] for name in CONVOLVED]
        weight = torch.cat([getattr(self, f"{name}_convolution_weight") for name in CONVOLVED])
        bias = None
        if self.config.convolution_bias:
            bias = torch.cat([getattr(self, f"{name}_convolution_bias") for name in CONVOLVED])
        channels = channels.transpose(0, 1)
        before = self._windows_before(state, channels, starts)
        step = nn.functional.softplus(step.float() + self.step_size_bias).transpose(0, 1)
        outputs, window = causal_conv1d(
            channels,
            weight,
            bias,
            initial_state=before(),
            document_starts=starts,
            activation="silu",
        )
        for name, part, end in zip(CONVOLVED, outputs.split(sizes, -1), window.split(sizes, -1), strict=True):
            convolved[name] = part
            final[f"{name}_convolution"] = end
        written = (
            convolved["value"].unflatten(-1, (self.local_heads, self.config.head_size)),
            step,
            -torch.exp(self.log_decay_rate),
            self._groups_of_heads(convolved["key"]),
        )
        initial = self._matrix_before(state, written, starts)
        (gate,) = later()
        recurrent, final["matrix"] = ssd(
            *written,
            self._groups_of_heads(convolved["query"]),
            skip=self.skip,
            initial_state=initial(),
            document_starts=starts,
            chunk_size=self.config.chunk_size,
        )
        if self.figures is not None:
            self.figures.gate("step_size", step)
            self.figures.gate("decay", torch.exp(step * written[2]))
            self.figures.state(final["matrix"])
        gate = gate.float() if self.config.gate_bias is None else gate.float() + self.gate_bias
        gated = recurrent.transpose(0, 1).flatten(2).float() * nn.functional.silu(gate)
        return self.output(self.norm(gated).to(hidden.dtype)), final


MIXER = Mamba2
