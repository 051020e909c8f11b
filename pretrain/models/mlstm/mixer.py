"""The mLSTM mixer: projections, gates, cell, per-head norm, output gate. Heads are split over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.mlstm import MLSTMState, mlstm
from kernels.mlstm.segments import start_exchange
from kernels.segments import Segments
from pretrain.models.linear import ColumnParallelProjections, Projection, RowParallelProjection
from pretrain.models.mixer import Documents, LayerContext, SequenceMixer, State, StateTensor
from pretrain.models.mlstm.config import MLSTMConfig
from pretrain.models.parameters import (
    ParameterSpec,
    constant,
    evenly_spaced,
    new_parameter,
    small_normal,
    wang_normal,
)

# Projections that no other segment hears of.
READ = ("query", "output_gate")


class MLSTM(SequenceMixer):
    """Matrix-memory LSTM in the layout of xLSTM-7B (arXiv 2503.13427, section 3; cell: arXiv 2405.04517).

    Per head, with queries scaled by ``head_size ** -0.5``::

        C_t = exp(logsigmoid(f_t)) C_{t-1} + exp(i_t) k_t v_t^T      n_t likewise with k_t
        h_t = C_t^T q_t / max(|n_t . q_t|, 1)

    then ``output(sigmoid(o) * layer_norm_per_head(h))``.
    """

    def __init__(self, config: MLSTMConfig, context: LayerContext):
        super().__init__()
        self.config = config
        width, heads = context.hidden_size, config.num_heads
        query_key, value = config.query_key_size(width), config.value_size(width)
        self.query_key_head, self.value_head = query_key // heads, value // heads
        self.local_heads = heads // context.tensor_parallel

        small = ParameterSpec(small_normal(width), shard_dimension=0)
        zero = ParameterSpec(constant(0.0), shard_dimension=0)
        self.projections = ColumnParallelProjections(
            width,
            {
                "query": Projection(query_key, small),
                "key": Projection(query_key, small),
                "value": Projection(value, small),
                "output_gate": Projection(value, zero),
                "input_gate": Projection(heads, zero),
                "forget_gate": Projection(heads, zero),
            },
            context.megatron,
        )
        vectors = {
            "input_gate_bias": (heads, constant(config.input_gate_bias)),
            "forget_gate_bias": (heads, evenly_spaced(*config.forget_gate_bias)),
            "norm_weight": (value, constant(1.0)),
        }
        for name, (size, initialise) in vectors.items():
            spec = ParameterSpec(initialise, shard_dimension=0, weight_decay=False)
            self.register_parameter(name, new_parameter((size,), spec))
        back = ParameterSpec(wang_normal(width, context.num_layers), shard_dimension=1)
        self.output = RowParallelProjection(value, width, back, context.megatron)
        self.states = {
            "matrix": StateTensor((heads, self.query_key_head, self.value_head), 0),
            "normalizer": StateTensor((heads, self.query_key_head), 0),
            "stabilizer": StateTensor((heads,), 0),
        }

    def state_tensors(self) -> dict[str, StateTensor]:
        return self.states

    def _gate(self, preactivation: Tensor, bias: Tensor) -> Tensor:
        """Capped gate in float32, ``(batch, sequence, heads)``."""
        cap = self.config.gate_soft_cap
        return (cap * torch.tanh((preactivation.float() + bias) / cap)).transpose(0, 1)

    def _heads(self, tensor: Tensor, head_size: int) -> Tensor:
        """``(sequence, batch, channels)`` to ``(batch, sequence, heads, head_size)``, no copy."""
        return tensor.unflatten(-1, (self.local_heads, head_size)).transpose(0, 1)

    def _state_before(
        self, state: State | Segments | None, written: tuple[Tensor, ...], starts: Tensor | None
    ) -> Callable[[], MLSTMState | None]:
        """What the cell begins with, to be called when other work is done: other ranks may have to be waited for."""
        if isinstance(state, Segments):
            return start_exchange(state, *written, starts)
        return lambda: None if state is None else MLSTMState(**state)

    def forward(
        self, hidden: Tensor, state: State | Segments | None, documents: Documents | None
    ) -> tuple[Tensor, State]:
        (key, value, input_gate, forget_gate), read = self.projections.in_turn(
            hidden, READ, apart=isinstance(state, Segments)
        )
        written = (
            self._heads(key, self.query_key_head),
            self._heads(value, self.value_head),
            self._gate(input_gate, self.input_gate_bias),
            self._gate(forget_gate, self.forget_gate_bias),
        )
        starts = None if documents is None else documents.starts
        initial = self._state_before(state, written, starts)
        query, output_gate = read()
        cell, final = mlstm(
            self._heads(query, self.query_key_head),
            *written,
            initial_state=initial(),
            document_starts=starts,
            chunk_size=self.config.chunk_size,
            epsilon=self.config.cell_epsilon,
        )
        if self.figures is not None:
            self.figures.gate("log_input_gate", written[2])
            self.figures.gate("forget_gate", torch.sigmoid(written[3]))
            self.figures.gate("output_gate", torch.sigmoid(output_gate.float()))
            self.figures.state(final.matrix, final.stabilizer[..., None, None])
        # The cell keeps the layout of its inputs in memory: turned back first, the norm needs no copy.
        cell = cell.transpose(0, 1).float()
        normed = nn.functional.layer_norm(cell, (self.value_head,), eps=self.config.norm_epsilon)
        normed = normed.flatten(2) * self.norm_weight
        gated = (torch.sigmoid(output_gate.float()) * normed).to(hidden.dtype)
        return self.output(gated), final._asdict()


MIXER = MLSTM
