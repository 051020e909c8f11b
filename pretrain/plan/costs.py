"""The costs of a mixer as a run uses it. Imports no torch."""

from __future__ import annotations

from pretrain.config.schema import Config
from pretrain.models.registry import MixerConfig, MixerCost, family_of

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2}


def mixer_cost(section: MixerConfig, config: Config, hidden_size: int, sequence_length: int) -> MixerCost:
    """What its family says of a mixer in the configuration's precision.

    Args:
        hidden_size: of the network that it stands in.
        sequence_length: positions that it sees.
    """
    element = BYTES_PER_ELEMENT[config.train.precision]
    return family_of(section).cost(section, hidden_size, sequence_length, element, config.model.num_layers)
