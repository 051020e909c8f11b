"""The mixers' exported classes, by their type: here of all that are registered, shipped of a model's own only."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from torch import nn

from pretrain.convert.custom import modeling_module
from pretrain.models.registry import MixerFamily, channel_mixers, sequence_mixers


def _classes(families: Iterable[MixerFamily]) -> dict[str, type[nn.Module]]:
    modules = {family.name: modeling_module(family) for family in families}
    return {name: importlib.import_module(module).MODELING for name, module in modules.items() if module is not None}


MIXERS = _classes(sequence_mixers().values())
CHANNELS = _classes(channel_mixers().values())
