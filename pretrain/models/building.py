"""The class of a model, by its configuration."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.config.model import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.registry import hierarchy_of


def build_decoder(model: ModelConfig, megatron: TransformerConfig, stages: Sequence[range] | None = None) -> Decoder:
    """This rank's part of a model on the current default device, its parameters not yet filled; groups must exist.

    Args:
        stages: layers of each pipeline stage; None: the even split.
    """
    if model.hierarchy is None:
        return Decoder(model, megatron, stages)
    return hierarchy_of(model.hierarchy).model(model, megatron)
