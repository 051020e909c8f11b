"""Layers of a model as plans see them: what each costs, wherever in a hierarchy it stands. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pretrain.config.carried_states import bytes_after_any_length
from pretrain.config.model import BlockConfig
from pretrain.config.schema import Config
from pretrain.models.mixer_config import HierarchyConfig
from pretrain.models.mixer_cost import MixerCost
from pretrain.models.registry import hierarchy_of
from pretrain.plan.context import kept_bytes
from pretrain.plan.costs import BYTES_PER_ELEMENT, FLOAT32, mixer_cost


@dataclass(frozen=True)
class BlockCost:
    """A residual block: its mixers' costs, how many norms there are, and its state before the first token.

    Attributes:
        positions_per_token: how many positions it has for each token that is read; below 1 within a hierarchy.
        norms: as many as mixers, each before one, unless it is a joint.
        place: the network that it belongs to, whose layers share modules; see ``mixer_config.OuterBlock``.
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

    def shared_by(self, mixer: MixerCost) -> dict[tuple[str, str], int]:
        """Parameters of modules that one of its mixers shares with other layers, by network and module."""
        return {(self.place, name): count for name, count in mixer.shared_parameters.items()}

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


def shared_parameters(layers: Iterable[BlockCost]) -> int:
    """Parameters that layers share, each network's counted once; every pipeline stage holds a copy."""
    shared: dict[tuple[str, str], int] = {}
    for layer in layers:
        for mixer in layer.mixers:
            shared |= layer.shared_by(mixer)
    return sum(shared.values())
