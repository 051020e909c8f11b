"""Bytes on a rank, part by part, from the configuration alone.

What the parts rest on: weights are float32 on every rank and split by tensor and pipeline parallelism, and over
data-parallel ranks only by ZeRO-3; gradients are float32; AdamW keeps two float32 moments; ZeRO 1 and 2 keep
another float32 copy of the partition that a rank updates. Activations are in ``train.precision``. At which moment of
a step a rank holds most, and what of these it then holds, is worked out in :mod:`pretrain.plan.peak`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pretrain.config.carried_states import bytes_after_any_length
from pretrain.config.model import BlockConfig
from pretrain.config.schema import Config
from pretrain.models.mixer_config import HierarchyConfig
from pretrain.models.mixer_cost import MixerCost
from pretrain.models.registry import hierarchy_of
from pretrain.plan.context import kept_bytes, segment_length
from pretrain.plan.costs import BYTES_PER_ELEMENT, mixer_cost
from pretrain.plan.layer_bytes import LayerBytes, layer_bytes

if TYPE_CHECKING:
    from pretrain.plan.teacher import TeacherCost

FLOAT32 = 4

# DeepSpeed's defaults, in elements: its gradient bucket, and the most weights that ZeRO-3 keeps gathered and
# updates in one piece.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class BlockCost:
    """A residual block: its mixers' costs, how many norms there are, and its state before the first token.

    Attributes:
        positions_per_token: how many positions it has for each token that is read; below 1 within a hierarchy.
        norms: as many as mixers, each before one, unless it is a joint.
        place: the network that it belongs to, whose layers share modules; see ``registry.OuterBlock``.
        carried_channels: float32 channels per position that its network hands from layer to layer.
        kept_of_segments: bytes that the last of several ranks keeps of what others said of a sequence.
        is_joint: it is no block, but what joins two stages of a hierarchy: never computed again in the backward pass.
        carried_state_bytes: state of one row that goes on from step to step; 0 where rows begin anew.
        names: what its mixers are called, in order.
    """

    mixers: tuple[MixerCost, ...]
    hidden_size: int
    initial_state_bytes: int
    positions_per_token: float
    norms: int
    place: str = "layers"
    carried_channels: int = 0
    is_joint: bool = False
    kept_of_segments: float = 0.0
    carried_state_bytes: int = 0
    names: tuple[str, ...] = ("joint",)

    @property
    def parameters(self) -> int:
        return sum(mixer.parameters for mixer in self.mixers) + self.norms * self.hidden_size

    @property
    def active_parameters(self) -> int:
        return sum(mixer.active_parameters for mixer in self.mixers) + self.norms * self.hidden_size

    def parameters_per_rank(self, tensor: int, expert: int = 1) -> int:
        """Parameters on one of ``tensor`` tensor-parallel and ``expert`` expert-parallel ranks."""
        mixers = sum(mixer.parameters_per_rank(tensor, expert) for mixer in self.mixers)
        return mixers + self.norms * self.hidden_size

    def input_bytes(self, bytes_per_element: int) -> float:
        """What a block reads, hidden states and what is carried beside them, per token read."""
        return self.positions_per_token * (self.hidden_size * bytes_per_element + FLOAT32 * self.carried_channels)

    def activation_bytes_per_token(self, config: Config) -> float:
        """Kept for the backward pass by one tensor-parallel rank when nothing is recomputed, per token read."""
        return sum(self.activation_bytes_by_mixer(config))

    def activation_bytes_by_mixer(self, config: Config) -> list[float]:
        """The same of each mixer, with the norm before it."""
        tensor = config.parallel.tensor
        # Each norm keeps its input in float32; its result is kept by the projections that read it.
        norm = self.hidden_size * (FLOAT32 + BYTES_PER_ELEMENT[config.train.precision])
        norm *= self.norms / len(self.mixers) / (tensor if config.parallel.sequence else 1)
        # A joint's work is not split.
        split = 1 if self.is_joint else tensor
        sizes = [mixer.activation_bytes_per_rank(split, config.parallel.sequence) for mixer in self.mixers]
        return [self.positions_per_token * (norm + size) for size in sizes]


def block_cost(
    block: BlockConfig, config: Config, hidden_size: int, positions_per_token: float, place: str
) -> BlockCost:
    """Costs of a block's mixers in a network, at its width and the configuration's sequence length and precision."""
    sections = [section for section in (block.mixer, block.channel) if section is not None]
    length = max(1, round(config.data.sequence_length * positions_per_token))
    mixers = tuple(mixer_cost(section, config, hidden_size, length) for section in sections)
    # Extrapolated from one and two tokens: a cache that grows with every token is empty before the first.
    states = [
        sum(mixer_cost(section, config, hidden_size, length).state_bytes for section in sections) for length in (1, 2)
    ]
    carried = None
    if config.train.carry_state and block.mixer is not None:
        carried = bytes_after_any_length(block.mixer, hidden_size, config.model.num_layers)
    return BlockCost(
        mixers,
        hidden_size,
        2 * states[0] - states[1],
        positions_per_token,
        len(mixers),
        place=place,
        carried_channels=sum(config.model.carried_channels(place).values()),
        kept_of_segments=kept_bytes(block, config),
        carried_state_bytes=carried or 0,
        names=tuple(section.type for section in sections),
    )


def layer_costs(config: Config) -> list[BlockCost]:
    """One :class:`BlockCost` for each layer of the model, in order; behind them those of a hierarchy's outer stages."""
    model = config.model
    positions = 1.0 if model.hierarchy is None else model.hierarchy.inner_positions_per_token
    by_name = {
        name: block_cost(model.blocks[name], config, model.hidden_size, positions, "layers")
        for name in set(model.layers)
    }
    costs = [by_name[model.layers[layer % len(model.layers)]] for layer in range(model.num_layers)]
    return costs if model.hierarchy is None else costs + _outer_costs(config, model.hierarchy)


def _outer_costs(config: Config, hierarchy: HierarchyConfig) -> list[BlockCost]:
    element, costs = BYTES_PER_ELEMENT[config.train.precision], []
    for outer in hierarchy_of(hierarchy).outer_costs(hierarchy, config.model.hidden_size, element):
        size, positions = outer.hidden_size, outer.positions_per_token
        if outer.joint is None:
            costs.append(block_cost(config.model.blocks[outer.block], config, size, positions, outer.place))
        else:
            costs.append(BlockCost((outer.joint,), size, 0, positions, outer.norms, is_joint=True))
    return costs


def shared_parameters(layers: list[BlockCost]) -> int:
    """Parameters that layers share, each network's counted once; every pipeline stage holds a copy."""
    shared: dict[tuple[str, str], int] = {}
    for layer in layers:
        for mixer in layer.mixers:
            shared |= {(layer.place, name): count for name, count in mixer.shared_parameters.items()}
    return sum(shared.values())


@dataclass(frozen=True)
class Stage:
    """One pipeline stage on one rank: its layers, its place, the batch that it sees, and what all layers share.

    Attributes:
        layers: in the order of :func:`layer_costs`.
        first_layer: index of the first of them in the model.
        shared: parameters that layers share, see :func:`shared_parameters`.
        teacher: that the rank holds beside them; None where there is none.
    """

    config: Config
    layers: list[BlockCost]
    index: int
    data_size: int
    shared: int = 0
    first_layer: int = 0
    teacher: TeacherCost | None = None

    @property
    def is_last(self) -> bool:
        return self.index == self.config.parallel.pipeline - 1

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch that one rank holds."""
        return self.config.train.micro_batch_size * segment_length(self.config)

    @property
    def copies(self) -> int:
        """Ranks that hold the same weights."""
        return self.data_size * self.config.parallel.context

    @property
    def rows(self) -> int:
        """Sequences of the global batch that this rank reads, all micro-batches together."""
        return self.config.train.global_batch_size // self.data_size

    @property
    def micro_batches(self) -> int:
        """Of this rank in an optimizer step."""
        return self.rows // self.config.train.micro_batch_size

    @property
    def micro_batches_in_flight(self) -> int:
        """Micro-batches whose activations 1F1B keeps at once (Narayanan et al. 2021, arXiv 2104.04473)."""
        return min(self.micro_batches, self.config.parallel.pipeline - self.index)

    @property
    def head_parameters(self) -> int:
        return -(-self.config.model.vocab_size // self.config.parallel.tensor) * self.config.model.embedding_size

    def under(self, config: Config) -> Stage:
        """The same layers cut the same way, under another ZeRO stage, batch or recomputation; counts are kept."""
        other = replace(self, config=config)
        vars(other).update({name: getattr(self, name) for name in ("parameters", "routed", "layer_bytes")})
        return other

    @functools.cached_property
    def layer_bytes(self) -> list[LayerBytes]:
        """What each layer holds, in the order of the forward pass."""
        return layer_bytes(self.config, self.layers, self.first_layer)

    @functools.cached_property
    def parameters(self) -> int:
        """Parameters of this rank's part of the model, before ZeRO splits anything."""
        parallel = self.config.parallel
        total = sum(layer.parameters_per_rank(parallel.tensor, parallel.expert) for layer in self.layers)
        total += self.shared
        first, last = self.index == 0, self.is_last
        # A tied embedding stands once on a stage, though it is both; first and last stage each have their copy.
        tied_on_one_stage = first and last and self.config.model.tie_embeddings
        total += self.head_parameters * (1 if tied_on_one_stage else first + last)
        if last:
            total += self.config.model.embedding_size
        return total

    @functools.cached_property
    def routed(self) -> int:
        """Those of :attr:`parameters` that belong to routed experts."""
        parallel = self.config.parallel
        mixers = [mixer for layer in self.layers for mixer in layer.mixers]
        return sum(mixer.routed_per_rank(parallel.tensor, parallel.expert) for mixer in mixers)

    @property
    def partition(self) -> int:
        """Parameters of one rank once ZeRO has split them: experts over those ranks alone that hold them."""
        routed = self.routed
        return -(-(self.parameters - routed) // self.copies) + -(-routed * self.config.parallel.expert // self.copies)


def pipeline_stages(
    config: Config, layers: list[BlockCost], data_size: int, teacher: TeacherCost | None = None
) -> list[Stage]:
    """A rank of each pipeline stage.

    Args:
        layers: of the whole model, as :func:`layer_costs` gives them.
        data_size: data-parallel ranks.
        teacher: of a run that has one.
    """
    shared = shared_parameters(layers)
    # A hierarchy's outer stages stand behind its layers, all on one stage.
    held = config.parallel.stage_layers(len(layers)) if config.parallel.pipeline > 1 else [range(len(layers))]
    return [
        Stage(config, layers[on.start : on.stop], index, data_size, shared, on.start, teacher)
        for index, on in enumerate(held)
    ]
