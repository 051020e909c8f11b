"""One stage of H-Net: encoder, router and decoder, and what joins them with the network further in."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from pretrain.config.model import ModelConfig
from pretrain.models.hierarchy.blocks import BlockStack
from pretrain.models.hierarchy.hnet.config import HNetStageConfig
from pretrain.models.hierarchy.hnet.routing import Boundaries, Router, choose, straight_through
from pretrain.models.mixer import Carried, Documents, State
from pretrain.models.parameters import ParameterSpec, constant, new_parameter, scale_learning_rate


class Residual(nn.Module):
    """The encoder's output past the chunks, ``W x`` in float32; at first nothing passes."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = new_parameter((hidden_size, hidden_size), ParameterSpec(constant(0.0)))

    def forward(self, encoded: Tensor) -> Tensor:
        """Maps ``(..., hidden_size)`` to the same shape, float32."""
        return nn.functional.linear(encoded.float(), self.weight)


class Padding(nn.Module):
    """Learned channels behind those of a narrower stage; at first zero."""

    def __init__(self, size: int):
        super().__init__()
        self.channels = new_parameter((size,), ParameterSpec(constant(0.0), weight_decay=False))

    def forward(self, vectors: Tensor) -> Tensor:
        """Maps ``(vectors, width)`` to ``(vectors, width + size)``."""
        return torch.cat([vectors, self.channels.to(vectors.dtype).expand(len(vectors), -1)], dim=-1)


class HNetStage(nn.Module):
    """An encoder whose output is chunked, and a decoder of what comes back for the chunks.

    Args:
        config: of this stage.
        place: key of its configuration below ``model``.
        model, megatron: of the whole model.
        inner_size: width of what stands further in.
        inner_learning_rate_factor: of what stands further in, to whose width ``widen`` pads.
        outer_depth: number of blocks in the stages round this one.
        has_norm: whether the decoder's norm is this stage's own; the outermost one's is the model's, before its head.
    """

    def __init__(
        self,
        config: HNetStageConfig,
        place: str,
        model: ModelConfig,
        megatron: TransformerConfig,
        inner_size: int,
        inner_learning_rate_factor: float,
        outer_depth: int,
        has_norm: bool,
    ):
        super().__init__()
        size, encoders = config.hidden_size, len(config.encoder)
        total = outer_depth + encoders + len(config.decoder)
        self.hidden_size = size
        depth = (outer_depth, total)
        self.encoder = BlockStack(config.encoder, size, model, megatron, depth, True, f"{place}.encoder")
        self.router = Router(size)
        self.residual = Residual(size)
        depth = (outer_depth + encoders, total)
        self.decoder = BlockStack(config.decoder, size, model, megatron, depth, has_norm, f"{place}.decoder")
        scale_learning_rate(self.parameters(), config.learning_rate_factor)
        # Parameters stand in modules that are called, or ZeRO-3 would not gather them.
        self.widen = Padding(inner_size - size) if inner_size > size else nn.Identity()
        scale_learning_rate(self.widen.parameters(), inner_learning_rate_factor)

    def encode(
        self, hidden: Tensor, states: dict[str, State] | None, documents: Documents | None, name: str
    ) -> tuple[Tensor, Boundaries, Carried, dict[str, State]]:
        """The encoder's output, the boundaries in it, what the encoder hands on, and the states of both."""
        encoded, carried, final = self.encoder(hidden, states, documents, f"{name}.encoder")
        previous = None if states is None else states[f"{name}.router"]["previous"]
        probability = self.router(encoded, previous, None if documents is None else documents.starts)
        final[f"{name}.router"] = {"previous": encoded[-1].float()}
        return encoded, choose(probability), carried, final

    def decode(
        self,
        smoothed: Tensor,
        encoded: Tensor,
        boundaries: Boundaries,
        states: dict[str, State] | None,
        documents: Documents | None,
        name: str,
    ) -> tuple[Tensor, Carried, dict[str, State]]:
        """The decoder's output from the chunks' vectors at each position, float32, beside the encoder's output."""
        confidence = straight_through(boundaries.confidence).t()[..., None]
        hidden = (smoothed * confidence + self.residual(encoded)).to(encoded.dtype)
        return self.decoder(hidden, states, documents, f"{name}.decoder")
