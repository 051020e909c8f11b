"""The costs of a mixer as a run uses it, and which blocks a run uses. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pretrain.config.schema import Config
from pretrain.models.mixer_config import MixerConfig
from pretrain.models.mixer_cost import MixerCost
from pretrain.models.registry import family_of, hierarchy_of

FLOAT32 = 4
BYTES_PER_ELEMENT = {"float32": FLOAT32, "bfloat16": 2}


def mixer_cost(section: MixerConfig, config: Config, hidden_size: int, sequence_length: int) -> MixerCost:
    """What its family says of a mixer in the configuration's precision.

    Args:
        hidden_size: of the network that it stands in.
        sequence_length: positions that it sees.
    """
    element = BYTES_PER_ELEMENT[config.train.precision]
    return family_of(section).cost(section, hidden_size, sequence_length, element, config.model.num_layers)


@dataclass(frozen=True)
class UsedBlock:
    """A block as a network uses it.

    Attributes:
        name: in ``model.blocks``.
        hidden_size: of the network.
        positions_per_token: that it has for each token read; below 1 within a hierarchy.
        count: how many layers are such blocks.
    """

    name: str
    hidden_size: int
    positions_per_token: float
    count: int


def used_blocks(config: Config, layers: range) -> list[UsedBlock]:
    """Blocks of some of the model's layers, and all of a hierarchy's outer stages, whose joints are left out."""
    model, hierarchy = config.model, config.model.hierarchy
    positions = 1.0 if hierarchy is None else hierarchy.inner_positions_per_token
    names = Counter(model.layers[layer % len(model.layers)] for layer in layers)
    used = [UsedBlock(name, model.hidden_size, positions, count) for name, count in names.items()]
    if hierarchy is not None:
        element = BYTES_PER_ELEMENT[config.train.precision]
        for outer in hierarchy_of(hierarchy).outer_costs(hierarchy, model.hidden_size, element):
            if outer.block is not None:
                used.append(UsedBlock(outer.block, outer.hidden_size, outer.positions_per_token, 1))
    return used
