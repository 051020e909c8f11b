"""Modules that all layers of one network share; see ``MeasuredModule.shared_modules``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from pretrain.config.model import BlockConfig
from pretrain.models.mixer import LayerContext, MeasuredModule
from pretrain.models.registry import family_of

if TYPE_CHECKING:
    from pretrain.models.block import Block


def shared_modules(blocks: Iterable[BlockConfig], context: LayerContext) -> dict[str, nn.Module]:
    """What layers of these kinds share, by name: new modules, of which the network has one each."""
    modules: dict[str, nn.Module] = {}
    for block in blocks:
        for config in (block.mixer, block.channel):
            if config is not None:
                modules = family_of(config).module.shared_modules(config, context) | modules
    return modules


def share(blocks: Iterable[Block], modules: Mapping[str, nn.Module]) -> None:
    """Gives every layer the modules of its network, which stay no part of it."""
    for block in blocks:
        for part in (block.mixer, block.channel):
            if isinstance(part, MeasuredModule):
                part.share(modules)
