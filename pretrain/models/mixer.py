"""The contract that every mixer keeps; everything else in the stack works through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from kernels.segments import Segments
from pretrain.models.mixer_config import MixerConfig
from pretrain.models.state_figures import StateFigures

State = dict[str, Tensor]
# What flows from layer to layer beside the hidden states; see MixerConfig.carried.
Carried = dict[str, Tensor]


@dataclass(frozen=True)
class LayerContext:
    """Where a mixer stands in the model.

    Attributes:
        hidden_size: width of the residual stream.
        layer: index over the whole model, from 0.
        num_layers: of the whole model.
        megatron: Megatron-core's configuration (parallel sizes, sequence parallelism).
    """

    hidden_size: int
    layer: int
    num_layers: int
    megatron: TransformerConfig

    @property
    def tensor_parallel(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()


@dataclass(frozen=True)
class Documents:
    """Where documents begin in a batch of packed sequences.

    Attributes:
        starts: ``(batch, sequence)`` bool, True at each document's first token. State restarts there. A
            sequence whose first flag is False goes on with the state that it is given.
        word_starts: ``(batch, sequence)`` bool, True at each word's first token; None unless the model reads words.
        sequence_lengths: ``(sequences,)`` int64, positions of the sequences that stand one after the other in a single
            row; None where every row is one sequence.
    """

    starts: Tensor
    word_starts: Tensor | None = None
    sequence_lengths: Tensor | None = None


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a mixer's recurrent state: its shape without the batch, and how ranks split it.

    Attributes:
        shape: of the whole state, all tensor-parallel ranks together; always float32. None is a dimension that
            grows with the tokens read and is 0 long at the beginning, as attention's keys: the newest entries are
            last, and zeros in front of them must count for nothing, so that sequences of different lengths can share
            a batch.
        shard_dimension: dimension of ``shape`` that is split over tensor-parallel ranks; None is replicated.
    """

    shape: tuple[int | None, ...]
    shard_dimension: int | None


class MeasuredModule(nn.Module):
    """A mixer that may report figures of its own, which the run logs with every step, and share modules with others.

    Attributes:
        METRICS: name -> how values of layers and ranks combine, ``"max"``, ``"sum"`` or ``"mean"``. The names are the
            same on every rank, also on those whose stage has no such layer.
        shared: modules that all layers of this kind share, by name; see :meth:`shared_modules`.
    """

    METRICS: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def shared_modules(cls, config: MixerConfig, context: LayerContext) -> dict[str, nn.Module]:
        """New modules that a model has once, however many of its layers use them; none, unless a mixer says otherwise.

        Every pipeline stage holds a copy, also one without such a layer; gradients of the copies are summed. Mixers
        whose configurations differ share what they give the same name.
        """
        return {}

    def share(self, modules: Mapping[str, nn.Module]) -> None:
        """Takes the modules of :meth:`shared_modules`, which belong to the model: they are no part of this one."""
        object.__setattr__(self, "shared", modules)

    def take_metrics(self) -> dict[str, float]:
        """A value for each name in ``METRICS`` since the last call; the next call begins anew.

        Every rank calls it together with the others, so that it may communicate with those that hold the same layers.
        """
        return {}


class SequenceMixer(MeasuredModule):
    """Maps hidden states to hidden states along the sequence.

    A subclass takes ``(config, context)`` and keeps these promises, which the conformance suite checks:

    * any sequence length, and any way of cutting a sequence into calls that hand on the state, give the same
      result: teacher forcing, chunks and one-token decoding are one function of the state;
    * no output depends on a later input;
    * at a document's first token the whole state (convolution windows too) is as at the very beginning;
    * state is float32, with the batch as its first dimension.

    Attributes:
        figures: where a recurrent mixer puts its gates and its state in numbers, in each forward pass; None: nowhere.
    """

    config: MixerConfig
    figures: StateFigures | None = None

    def state_tensors(self) -> Mapping[str, StateTensor]:
        """The tensors of the state by name."""
        raise NotImplementedError(f"{type(self).__name__} must declare its state")

    def initial_state(self, batch_size: int, device: torch.device) -> State:
        """This rank's part of the state before the first token: zeros, unless a mixer says otherwise."""
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        state = {}
        for name, declared in self.state_tensors().items():
            shape = [0 if size is None else size for size in declared.shape]
            if declared.shard_dimension is not None:
                shape[declared.shard_dimension] //= ranks
            state[name] = torch.zeros(batch_size, *shape, dtype=torch.float32, device=device)
        return state

    def forward(
        self, hidden: Tensor, state: State | Segments | None, documents: Documents | None
    ) -> tuple[Tensor, State]:
        """One call.

        Args:
            hidden: ``(sequence, batch, hidden_size)``; under sequence parallelism this rank's part of the
                sequence, while ``documents`` always describes the whole of it.
            state: as returned by an earlier call, or None at the beginning. A mixer whose configuration says
                ``exchanges_segments`` may also find where this call's tokens stand among segments of the same
                sequences on other ranks, which make the same call; it asks those for the state.
            documents: where documents begin; None: nowhere within this call.

        Returns:
            Hidden states of the same shape, and the state after the last token.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward")


class ChannelMixer(MeasuredModule):
    """Maps each position's hidden state by itself; takes ``(config, context)``."""

    config: MixerConfig

    def forward(self, hidden: Tensor, carried: Carried | None = None) -> Tensor | tuple[Tensor, Carried]:
        """Maps ``(sequence, batch, hidden_size)`` to the same shape.

        Args:
            hidden: under sequence parallelism this rank's part of the sequence.
            carried: given to mixers whose configuration says that it carries something, and to no others: tensors
                ``(sequence, batch, channels)`` float32, of the same positions, by name; names of other mixers too.
                Where the only row holds several sequences, how long they are under ``registry.SEQUENCE_LENGTHS``.

        Returns:
            The output; of a mixer that carries something also all of ``carried``, its own tensors anew.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward")
