"""The sLSTM mixer: convolution, block-diagonal projections, cell, per-head norm. Heads are split over ranks."""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel import mappings
from torch import Generator, Tensor, nn

from kernels.conv1d import causal_conv1d
from kernels.slstm import SLSTMState, slstm
from pretrain.models.mixer import Documents, LayerContext, SequenceMixer, State, StateTensor
from pretrain.models.parameters import (
    Initialiser,
    ParameterSpec,
    constant,
    new_parameter,
    small_normal,
    uniform,
)
from pretrain.models.slstm.config import SLSTMConfig
from pretrain.models.state_figures import values_before

# In the order of the kernel. The first two see the convolved input, the others the input itself.
GATES = ("input_gate", "forget_gate", "cell_input", "output_gate")
STATE = SLSTMState._fields


def power_law_forget_bias(layer: int, num_layers: int) -> Initialiser:
    """Biases (4, heads, head_size), zero but for the forget gate's: from 5 down to -7 across each head's channels.

    ``5 - 12 (j / (head_size - 1)) ** (0.3 + 1.3 layer / (num_layers - 1))``: later layers forget more slowly
    (initialisation "powerlaw_blockdependent" of the authors' xLSTM code).
    """
    exponent = 0.3 + 1.3 * layer / max(num_layers - 1, 1)

    def fill(tensor: Tensor, generator: Generator) -> None:
        size = tensor.shape[-1]
        tensor.zero_()
        tensor[GATES.index("forget_gate")] = 5.0 - 12.0 * (torch.arange(size) / max(size - 1, 1)) ** exponent

    return fill


class SLSTM(SequenceMixer):
    """Scalar-memory LSTM with exponential gates (Beck et al. 2024, arXiv 2405.04517, sections 2.2 and 2.4).

    Input and forget gate are projected from ``silu(convolution(x))``, cell input and output gate from ``x``, each by
    a matrix per head; the gates of a head also see its hidden state of the token before (``kernels.slstm``). The
    output is the hidden state under a layer norm per head. As in the published layer there is no output projection:
    heads mix in the channel mixer that follows. The weight of the norm is plain and starts at 1, where the authors'
    code keeps the difference from 1, which is the same without weight decay.

    With tensor parallelism a rank reads its heads' channels of the input at all positions, and has its heads'
    channels of the output. Without sequence parallelism the former are a slice and the latter are gathered; with it
    both are exchanged for the rank's part of the sequence, all to all, which moves no channel to a rank that does
    not use it.
    """

    def __init__(self, config: SLSTMConfig, context: LayerContext):
        super().__init__()
        self.config = config
        self.sequence_parallel = context.megatron.sequence_parallel and context.tensor_parallel > 1
        width, heads = context.hidden_size, config.num_heads
        self.head_size = width // heads
        self.local_heads = heads // context.tensor_parallel
        small = ParameterSpec(small_normal(width), shard_dimension=0)
        for name in GATES:
            self.register_parameter(f"{name}_weight", new_parameter((heads, self.head_size, self.head_size), small))
        recurrent = ParameterSpec(constant(0.0), shard_dimension=1)
        self.recurrent_weight = new_parameter((4, heads, self.head_size, self.head_size), recurrent)
        biases = ParameterSpec(
            power_law_forget_bias(context.layer, context.num_layers), shard_dimension=1, weight_decay=False
        )
        self.bias = new_parameter((4, heads, self.head_size), biases)
        norm = ParameterSpec(constant(1.0), shard_dimension=0, weight_decay=False)
        self.norm_weight = new_parameter((width,), norm)
        self.states = {name: StateTensor((heads, self.head_size), 0) for name in STATE}
        taps = config.convolution_width
        if taps:
            bound = math.sqrt(1.0 / taps)
            weight = ParameterSpec(uniform(-bound, bound), shard_dimension=0)
            bias = ParameterSpec(uniform(-bound, bound), shard_dimension=0, weight_decay=False)
            self.convolution_weight = new_parameter((width, taps), weight)
            self.convolution_bias = new_parameter((width,), bias)
            self.states["window"] = StateTensor((taps - 1, width), 1)

    def state_tensors(self) -> dict[str, StateTensor]:
        return self.states

    def _own_channels(self, hidden: Tensor) -> Tensor:
        """This rank's channels at all positions, ``(sequence, batch, channels)``."""
        if not self.sequence_parallel:
            return mappings.scatter_to_tensor_model_parallel_region(hidden)
        batch = hidden.shape[1]
        return mappings.all_to_all_sp2hp(hidden.flatten(0, 1)).unflatten(0, (-1, batch))

    def _all_channels(self, hidden: Tensor) -> Tensor:
        """The inverse of ``_own_channels``."""
        if not self.sequence_parallel:
            return mappings.gather_from_tensor_model_parallel_region(hidden)
        batch = hidden.shape[1]
        return mappings.all_to_all_hp2sp(hidden.flatten(0, 1)).unflatten(0, (-1, batch))

    def _project(self, hidden: Tensor, *gates: str) -> Tensor:
        """``(sequence, batch, channels)`` to ``(heads, sequence * batch, gates, head_size)``."""
        by_head = hidden.reshape(-1, self.local_heads, self.head_size).transpose(0, 1)
        weights = torch.cat([getattr(self, f"{name}_weight").to(hidden.dtype) for name in gates], 1)
        return torch.bmm(by_head, weights.mT).unflatten(-1, (len(gates), self.head_size))

    @torch.no_grad()
    def _add_figures(
        self, gates: Tensor, hidden: Tensor, last: SLSTMState, before: Tensor | None, starts: Tensor | None
    ) -> None:
        """Gates are found again, with what they saw of the hidden state before each token."""
        recurrent = torch.einsum(
            "ghde,bthe->btghd", self.recurrent_weight, values_before(hidden.float(), before, starts)
        )
        full = gates.float() + self.bias + recurrent
        self.figures.gate("log_input_gate", full[:, :, GATES.index("input_gate")])
        for name in ("forget_gate", "output_gate"):
            self.figures.gate(name, torch.sigmoid(full[:, :, GATES.index(name)]))
        self.figures.state(last.cell, last.stabilizer)

    def forward(self, hidden: Tensor, state: State | None, documents: Documents | None) -> tuple[Tensor, State]:
        starts = None if documents is None else documents.starts
        hidden = self._own_channels(hidden)
        convolved, final = hidden, {}
        if self.config.convolution_width:
            convolved, final["window"] = causal_conv1d(
                hidden.transpose(0, 1),
                self.convolution_weight,
                self.convolution_bias,
                initial_state=None if state is None else state["window"],
                document_starts=starts,
                activation="silu",
            )
            convolved = convolved.transpose(0, 1)
        gates = torch.cat([self._project(convolved, *GATES[:2]), self._project(hidden, *GATES[2:])], 2)
        # (heads, sequence, batch, gates, size), as the kernel's loop goes through it.
        gates = gates.unflatten(1, hidden.shape[:2]).permute(2, 1, 3, 0, 4)
        cell, last = slstm(
            gates,
            self.recurrent_weight,
            self.bias,
            initial_state=None if state is None else SLSTMState(*(state[name] for name in STATE)),
            document_starts=starts,
        )
        if self.figures is not None:
            self._add_figures(gates, cell, last, None if state is None else state["hidden"], starts)
        cell = cell.transpose(0, 1).float()
        normed = nn.functional.layer_norm(cell, (self.head_size,), eps=self.config.norm_epsilon)
        output = (normed.flatten(2) * self.norm_weight).to(hidden.dtype)
        return self._all_channels(output), final | last._asdict()


MIXER = SLSTM
