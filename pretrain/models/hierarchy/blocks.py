"""Blocks that hierarchies put round the innermost network."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config.schema import ModelConfig
from pretrain.models.decoder import Block
from pretrain.models.mixer import Documents, LayerContext, State
from pretrain.models.norm import NORMS


class BlockStack(nn.Module):
    """Blocks one after the other, and a norm behind them where asked for."""

    def __init__(
        self,
        names: list[str],
        hidden_size: int,
        model: ModelConfig,
        megatron: TransformerConfig,
        depth: tuple[int, int],
        has_norm: bool,
    ):
        """
        Args:
            names: of the blocks, in order.
            hidden_size: their width.
            model, megatron: of the whole model.
            depth: how many blocks a byte has passed before these, and how many it passes in all at this stage.
            has_norm: whether the norm is this stack's own.
        """
        super().__init__()
        self.recomputes = megatron.recompute_granularity is not None
        before, total = depth
        self.layers = nn.ModuleList(
            Block(model.blocks[name], model, LayerContext(hidden_size, before + index, total, megatron))
            for index, name in enumerate(names)
        )
        self.norm = NORMS[model.norm](hidden_size, model.norm_epsilon, False) if has_norm else None

    def forward(
        self, hidden: Tensor, states: dict[str, State] | None, documents: Documents | None, name: str
    ) -> tuple[Tensor, dict[str, State]]:
        """Hidden states of the same shape, and the blocks' states under ``name.INDEX``, as ``states`` has them."""
        final: dict[str, State] = {}
        for index, block in enumerate(self.layers):
            key = f"{name}.{index}"
            state = None if states is None else states.get(key)
            if self.recomputes and torch.is_grad_enabled():
                hidden, state, _ = checkpoint(block, hidden, state, documents, use_reentrant=False)
            else:
                hidden, state, _ = block(hidden, state, documents)
            if state is not None:
                final[key] = state
        return hidden if self.norm is None else self.norm(hidden), final
