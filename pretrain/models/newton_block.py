"""The block around a recurrence that Newton's method solves in parallel; ParaGRU and ParaLSTM are two of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from kernels.conv1d import causal_conv1d
from kernels.conv1d.segments import start_exchange as start_window_exchange
from kernels.newton_rnn import NewtonReport
from kernels.segments import Segments
from pretrain.models.linear import ColumnParallelProjections, Projection, RowParallelProjection
from pretrain.models.mixer import Documents, LayerContext, SequenceMixer, State, StateTensor
from pretrain.models.newton_config import NewtonBlockConfig
from pretrain.models.norm import GroupedRMSNorm
from pretrain.models.parameters import (
    Initialiser,
    ParameterSpec,
    constant,
    new_parameter,
    small_normal,
    uniform,
    wang_normal,
)

GATES = 3


def clipped_normal(standard_deviation: float, bound: float) -> Initialiser:
    """N(0, standard_deviation^2), values beyond +-bound moved to it."""

    def fill(tensor: Tensor, generator: Generator) -> None:
        tensor.normal_(0.0, standard_deviation, generator=generator).clamp_(-bound, bound)

    return fill


def first_row_evenly_spaced(first: float, last: float) -> Initialiser:
    """Starts a matrix from evenly spaced values in its first row and zeros in the others."""

    def fill(tensor: Tensor, generator: Generator) -> None:
        tensor.zero_()
        tensor[0] = torch.linspace(first, last, tensor.shape[1])

    return fill


class _HeadwiseGates(torch.autograd.Function):
    """Block-diagonal map of channels to gates, in the dtype of the channels.

    The float32 weight, not its cast copy, is kept for the backward pass; and each gate's product is written where
    the recurrence reads it, with no copy in between.
    """

    @staticmethod
    def forward(ctx: Any, channels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Maps ``(tokens, heads, size)`` to ``(tokens, gates, heads, size)``.

        ``weight`` is ``(heads, size, gates, size)``, ``bias`` ``(gates, heads, size)``.
        """
        ctx.save_for_backward(channels, weight)
        by_head, cast = channels.transpose(0, 1), weight.to(channels.dtype)
        gates = channels.new_empty(channels.shape[0], *bias.shape)
        for gate, row in enumerate(bias.to(channels.dtype)):
            product = gates[:, gate].transpose(0, 1)
            torch.baddbmm(row[:, None], by_head, cast[:, :, gate], out=product)
        return gates

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        channels, weight = ctx.saved_tensors
        by_head = gradient.permute(2, 0, 1, 3).flatten(2)
        cast = weight.to(channels.dtype).flatten(2)
        of_channels = torch.bmm(by_head, cast.transpose(1, 2)).transpose(0, 1)
        of_weight = torch.bmm(channels.permute(1, 2, 0), by_head).view_as(weight)
        return of_channels, of_weight.to(weight.dtype), gradient.sum(0, dtype=weight.dtype)


class _NewtonFigures:
    """The worst residual and iteration count of all solves since they were last taken, and all fallbacks.

    Kept on the device: reading them waits for it, which a forward pass should not.
    """

    def __init__(self) -> None:
        self.figures: Tensor | None = None

    def add(self, report: NewtonReport) -> None:
        # A block that is recomputed in the backward pass solves the same system again.
        if torch._C._current_graph_task_id() != -1:
            return
        fields = (report.residual, report.iterations, report.fallbacks)
        new = torch.stack([torch.as_tensor(field).detach().float().reshape(()) for field in fields])
        if self.figures is not None:
            old = self.figures
            new = torch.cat([torch.maximum(old[:2], new[:2]), old[2:] + new[2:]])
        self.figures = new

    def take(self) -> dict[str, float]:
        values = (0.0,) * 3 if self.figures is None else self.figures.tolist()
        self.figures = None
        return dict(zip(("newton_residual", "newton_iterations", "newton_fallbacks"), values, strict=True))


class NewtonBlock(SequenceMixer):
    """Projection, causal convolution, elementwise nonlinear recurrence, gated norm, projection back.

    The block of ParaRNN (Danieli et al. 2025, arXiv 2510.21450), per token::

        u, z = input(x), output_gate(x)
        p    = blockdiagonal(silu(convolution(u))) + bias       three gates' pre-activations per channel
        h    = cell(p)                                          Newton's method over the whole sequence
        y    = output(rms_norm(h) * silu(z))                    the norm first, then the gate

    The recurrence runs in float32 and per channel, so ranks that hold different heads need no communication in
    it; only the norm, where it spans heads, adds up squares.

    First values. Recurrent weights and peepholes: N(0, (2 / sqrt(5 channels))^2) as in the authors' code, within
    the bound. Block-diagonal map: U(-sqrt(3 / size), sqrt(3 / size)) for heads of ``size`` channels, of variance
    1 / size (Kaiming): it keeps the variance and is the same for both cells, where the authors' code takes
    Xavier's with a fan-out that differs between its cells. Bias: zero but for the row that decides what is kept,
    see ``keeping_sign``. Convolution: U(-1, 1) / sqrt(width), torch's own. Projections as elsewhere here.

    Attributes:
        peepholes: vectors of recurrent weights beside the three of the gates, in a parameter of their own.
        state_names: tensors of the cell's state, in the kernel's order.
        keeping_sign: +1 where a larger pre-activation of the first gate keeps more of the old state, else -1.
    """

    METRICS: ClassVar[Mapping[str, str]] = {
        "newton_residual": "max",
        "newton_iterations": "max",
        "newton_fallbacks": "sum",
    }
    peepholes: ClassVar[int] = 0
    state_names: ClassVar[tuple[str, ...]]
    keeping_sign: ClassVar[int]

    def __init__(self, config: NewtonBlockConfig, context: LayerContext):
        super().__init__()
        self.config = config
        width, inner = context.hidden_size, config.inner_size(context.hidden_size)
        self.head_size = inner // config.num_heads
        self.local_heads = config.num_heads // context.tensor_parallel

        into = Projection(inner, ParameterSpec(small_normal(width), shard_dimension=0))
        self.projections = ColumnParallelProjections(width, {"input": into, "output_gate": into}, context.megatron)
        window = config.convolution_width
        taps = uniform(-(window**-0.5), window**-0.5)
        mapped = math.sqrt(3 / self.head_size)
        bound = config.recurrent_bound
        small = clipped_normal(2 / math.sqrt(5 * inner), bound)
        kept = first_row_evenly_spaced(*(self.keeping_sign * value for value in config.memory_bias))
        map_shape = (config.num_heads, self.head_size, GATES, self.head_size)
        parameters: dict[str, tuple[tuple[int, ...], ParameterSpec]] = {
            "convolution_weight": ((inner, window), ParameterSpec(taps, 0)),
            "convolution_bias": ((inner,), ParameterSpec(constant(0.0), 0, weight_decay=False)),
            "input_map": (map_shape, ParameterSpec(uniform(-mapped, mapped), 0)),
            "bias": ((GATES, inner), ParameterSpec(kept, 1, weight_decay=False)),
            "recurrent": ((GATES, inner), ParameterSpec(small, 1, weight_decay=False, bound=bound)),
        }
        if self.peepholes:
            spec = ParameterSpec(small, 1, weight_decay=False, bound=bound)
            parameters["peephole"] = ((self.peepholes, inner), spec)
        for name, (shape, spec) in parameters.items():
            self.register_parameter(name, new_parameter(shape, spec))
        self.norm = GroupedRMSNorm(inner, config.norm_groups, config.norm_epsilon)
        back = ParameterSpec(wang_normal(width, context.num_layers), shard_dimension=1)
        self.output = RowParallelProjection(inner, width, back, context.megatron)
        self.newton = _NewtonFigures()
        self.states = {name: StateTensor((inner,), 0) for name in self.state_names}
        self.states["convolution"] = StateTensor((window - 1, inner), 1)

    def state_tensors(self) -> dict[str, StateTensor]:
        return self.states

    def take_metrics(self) -> dict[str, float]:
        return self.newton.take()

    def solve(
        self, gates: Tensor, state: State | None, starts: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], NewtonReport]:
        """The recurrence.

        Args:
            gates: ``(batch, sequence, 3, channels)`` pre-activations.
            state: of the whole mixer; None at the beginning.
            starts: ``(batch, sequence)`` bool, where documents begin.
            options: of Newton's method, for the kernel.

        Returns:
            Hidden states ``(batch, sequence, channels)``, the final state by ``state_names``, Newton's report.
        """
        raise NotImplementedError(f"{type(self).__name__} must solve its recurrence")

    def add_gates(self, gates: Tensor, hidden: Tensor, state: State | None, starts: Tensor | None) -> None:
        """Puts the gates of a solved recurrence into ``figures``; shapes as in :meth:`solve`, without gradient."""
        raise NotImplementedError(f"{type(self).__name__} must say what its gates are")

    @torch.no_grad()
    def _add_figures(
        self,
        gates: Tensor,
        hidden: Tensor,
        final: Mapping[str, Tensor],
        state: State | Segments | None,
        starts: Tensor | None,
    ) -> None:
        if isinstance(state, Segments):
            # The gates of a segment's first token have seen the state of the rank before.
            before = state.shift(torch.stack([final[name] for name in self.state_names]), 1)
            state = None if before is None else dict(zip(self.state_names, before, strict=True))
        self.add_gates(gates.float(), hidden.float(), state, starts)
        self.figures.state(final[self.state_names[0]].unflatten(1, (self.local_heads, self.head_size)))

    def _window_before(
        self, state: State | Segments | None, inputs: Tensor, starts: Tensor | None
    ) -> Callable[[], Tensor | None]:
        """What the convolution begins with, to be called when other work is done: another rank may have to send it."""
        if isinstance(state, Segments):
            return start_window_exchange(state, inputs, self.config.convolution_width, starts)
        return lambda: None if state is None else state["convolution"]

    def forward(
        self, hidden: Tensor, state: State | Segments | None, documents: Documents | None
    ) -> tuple[Tensor, State]:
        (inputs,), later = self.projections.in_turn(hidden, ("output_gate",), apart=isinstance(state, Segments))
        starts = None if documents is None else documents.starts
        inputs = inputs.transpose(0, 1)
        before = self._window_before(state, inputs, starts)
        (output_gate,) = later()
        convolved, window = causal_conv1d(
            inputs,
            self.convolution_weight,
            self.convolution_bias,
            initial_state=before(),
            document_starts=starts,
            activation="silu",
        )
        batch, length, _ = convolved.shape
        gates = _HeadwiseGates.apply(
            convolved.reshape(batch * length, self.local_heads, self.head_size),
            self.input_map,
            self.bias.unflatten(1, (self.local_heads, self.head_size)),
        )
        options: dict[str, Any] = {
            "iterations": self.config.newton_iterations,
            "max_iterations": self.config.newton_max_iterations,
            "tolerance": self.config.newton_tolerance,
        }
        given, gates = state, gates.view(batch, length, GATES, -1)
        if isinstance(state, Segments):
            state, options["segments"] = None, state
        recurrent, final, report = self.solve(gates, state, starts, options)
        self.newton.add(report)
        if self.figures is not None:
            self._add_figures(gates, recurrent, final, given, starts)
        gated = self.norm(recurrent.transpose(0, 1)) * nn.functional.silu(output_gate.float())
        return self.output(gated.to(hidden.dtype)), final | {"convolution": window}
