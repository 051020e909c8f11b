"""The mLSTM mixer of the first xLSTM: up projection, convolution, cell, skip, gate, down projection."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from kernels.conv1d import causal_conv1d
from kernels.conv1d.segments import start_exchange as start_window_exchange
from kernels.mlstm import MLSTMState, mlstm
from kernels.mlstm.segments import start_exchange
from kernels.segments import Segments
from pretrain.models.linear import ColumnParallelProjections, Projection, RowParallelProjection
from pretrain.models.mixer import Documents, LayerContext, SequenceMixer, State, StateTensor
from pretrain.models.mlstm_pre_up.config import MLSTMPreUpConfig
from pretrain.models.parameters import (
    ParameterSpec,
    constant,
    evenly_spaced,
    new_parameter,
    normal,
    small_normal,
    uniform,
    wang_normal,
)

STATE = MLSTMState._fields


class MLSTMPreUp(SequenceMixer):
    """mLSTM block with pre up-projection (Beck et al. 2024, arXiv 2405.04517, section 2.4; cell: section 2.3).

    With ``[x, z] = up(hidden)`` and ``c = silu(convolution(x))``: queries and keys are block-diagonal maps of ``c``,
    values one of ``x``, and the gates of each head a linear map of all queries, keys and values. The result is
    ``down((layer_norm_per_head(cell) + skip * c) * silu(z))``. The weight of the norm is plain and starts at 1,
    where the authors' code keeps the difference from 1, which is the same without weight decay.

    Heads are split over tensor-parallel ranks. The gates alone need the channels of all ranks: each rank multiplies
    its own, and the float32 sums are reduced and scattered by head.
    """

    def __init__(self, config: MLSTMPreUpConfig, context: LayerContext):
        super().__init__()
        self.config = config
        width, heads, inner = context.hidden_size, config.num_heads, config.inner_size(context.hidden_size)
        self.head_size = inner // heads
        self.local_heads = heads // context.tensor_parallel
        small = ParameterSpec(small_normal(width), shard_dimension=0)
        self.projections = ColumnParallelProjections(
            width, {"cell": Projection(inner, small), "output_gate": Projection(inner, small)}, context.megatron
        )
        bound = math.sqrt(1.0 / config.convolution_width)
        block = config.projection_block_size
        blocks = (inner // block, block, block)
        weights = {
            "convolution_weight": ((inner, config.convolution_width), uniform(-bound, bound), 0),
            "query_weight": (blocks, small_normal(width), 0),
            "key_weight": (blocks, small_normal(width), 0),
            "value_weight": (blocks, small_normal(width), 0),
            # Of queries, keys and values, each of whose channels are split.
            "input_gate_weight": ((heads, 3, inner), constant(0.0), 2),
            "forget_gate_weight": ((heads, 3, inner), constant(0.0), 2),
        }
        vectors = {
            "convolution_bias": (inner, uniform(-bound, bound)),
            "input_gate_bias": (heads, normal(config.input_gate_bias_deviation)),
            "forget_gate_bias": (heads, evenly_spaced(*config.forget_gate_bias)),
            "norm_weight": (inner, constant(1.0)),
            "skip": (inner, constant(1.0)),
        }
        for name, (shape, initialise, dimension) in weights.items():
            self.register_parameter(name, new_parameter(shape, ParameterSpec(initialise, shard_dimension=dimension)))
        for name, (size, initialise) in vectors.items():
            spec = ParameterSpec(initialise, shard_dimension=0, weight_decay=False)
            self.register_parameter(name, new_parameter((size,), spec))
        back = ParameterSpec(wang_normal(width, context.num_layers), shard_dimension=1)
        self.output = RowParallelProjection(inner, width, back, context.megatron)
        self.states = {
            "matrix": StateTensor((heads, self.head_size, self.head_size), 0),
            "normalizer": StateTensor((heads, self.head_size), 0),
            "stabilizer": StateTensor((heads,), 0),
            "window": StateTensor((config.convolution_width - 1, inner), 1),
        }

    def state_tensors(self) -> dict[str, StateTensor]:
        return self.states

    def _project(self, hidden: Tensor, *weights: Tensor) -> list[Tensor]:
        """Block-diagonal maps of ``(sequence, batch, channels)``, each to the same shape."""
        block = self.config.projection_block_size
        by_block = hidden.reshape(-1, hidden.shape[-1] // block, block).transpose(0, 1)
        product = torch.bmm(by_block, torch.cat([weight.to(hidden.dtype) for weight in weights], 1).mT)
        return [part.transpose(0, 1).reshape(hidden.shape) for part in product.split(block, -1)]

    def _gates(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Input and forget gates ``(batch, sequence, heads)`` of this rank's heads, float32."""
        # Each head's two gates are neighbours, so that a rank's part of the sums is that of its heads.
        weights = torch.stack([self.input_gate_weight, self.forget_gate_weight], 1).flatten(0, 1)
        parts = [
            nn.functional.linear(tensor, weight.to(tensor.dtype)).float()
            for tensor, weight in zip(inputs, weights.unbind(1), strict=True)
        ]
        sums = mappings.reduce_scatter_last_dim_to_tensor_parallel_region(sum(parts))
        input_gate, forget_gate = sums.unflatten(-1, (-1, 2)).transpose(0, 1).unbind(-1)
        return input_gate + self.input_gate_bias, forget_gate + self.forget_gate_bias

    def _window_before(
        self, state: State | Segments | None, inputs: Tensor, starts: Tensor | None
    ) -> Callable[[], Tensor | None]:
        """What the convolution begins with, to be called when other work is done."""
        if isinstance(state, Segments):
            return start_window_exchange(state, inputs, self.config.convolution_width, starts)
        return lambda: None if state is None else state["window"]

    def _state_before(
        self, state: State | Segments | None, written: tuple[Tensor, ...], starts: Tensor | None
    ) -> Callable[[], MLSTMState | None]:
        """What the cell begins with, likewise."""
        if isinstance(state, Segments):
            return start_exchange(state, *written, starts)
        return lambda: None if state is None else MLSTMState(*(state[name] for name in STATE))

    def forward(
        self, hidden: Tensor, state: State | Segments | None, documents: Documents | None
    ) -> tuple[Tensor, State]:
        starts = None if documents is None else documents.starts
        (inner,), later = self.projections.in_turn(hidden, ("output_gate",), apart=isinstance(state, Segments))
        by_token = inner.transpose(0, 1)
        before = self._window_before(state, by_token, starts)
        (value,) = self._project(inner, self.value_weight)
        convolved, window = causal_conv1d(
            by_token,
            self.convolution_weight,
            self.convolution_bias,
            initial_state=before(),
            document_starts=starts,
            activation="silu",
        )
        convolved = convolved.transpose(0, 1)
        query, key = self._project(convolved, self.query_weight, self.key_weight)
        gates = self._gates([query, key, value])
        heads = (self.local_heads, self.head_size)
        query, key, value = (tensor.unflatten(-1, heads).transpose(0, 1) for tensor in (query, key, value))
        initial = self._state_before(state, (key, value, *gates), starts)
        (output_gate,) = later()
        cell, final = mlstm(
            query,
            key,
            value,
            *gates,
            initial_state=initial(),
            document_starts=starts,
            chunk_size=self.config.chunk_size,
            epsilon=self.config.cell_epsilon,
        )
        if self.figures is not None:
            self.figures.gate("log_input_gate", gates[0])
            self.figures.gate("forget_gate", torch.sigmoid(gates[1]))
            self.figures.state(final.matrix, final.stabilizer[..., None, None])
        # The cell keeps the layout of its inputs in memory: turned back first, the norm needs no copy.
        cell = cell.transpose(0, 1).float()
        normed = nn.functional.layer_norm(cell, (self.head_size,), eps=self.config.norm_epsilon)
        mixed = normed.flatten(2) * self.norm_weight + self.skip * convolved
        gated = (mixed * nn.functional.silu(output_gate.float())).to(hidden.dtype)
        return self.output(gated), final._asdict() | {"window": window}


MIXER = MLSTMPreUp
