"""Blocks that hierarchies put round the innermost network."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config.model import ModelConfig
from pretrain.models.block import Block
from pretrain.models.carried import initial_carried
from pretrain.models.mixer import Carried, Documents, LayerContext, State
from pretrain.models.norm import NORMS
from pretrain.models.sharing import share, shared_modules


class BlockStack(nn.Module):
    """Blocks one after the other, and a norm behind them where asked for: a network, or a part of one."""

    def __init__(
        self,
        names: list[str],
        hidden_size: int,
        model: ModelConfig,
        megatron: TransformerConfig,
        depth: tuple[int, int],
        has_norm: bool,
        place: str,
        shared: nn.ModuleDict | None = None,
    ):
        """
        Args:
            names: of the blocks, in order.
            hidden_size: their width.
            model, megatron: of the whole model.
            depth: how many blocks a byte has passed before these, and how many it passes in all at this stage.
            has_norm: whether the norm is this stack's own.
            place: of the network, as ``ModelConfig.used_blocks`` has it.
            shared: what the layers of the network share, where this is a part of one; None: it is all of it.
        """
        super().__init__()
        self.recomputes = megatron.recompute_granularity is not None
        before, total = depth
        self.layers = nn.ModuleList(
            Block(model.blocks[name], model, LayerContext(hidden_size, before + index, total, megatron))
            for index, name in enumerate(names)
        )
        self.norm = NORMS[model.norm](hidden_size, model.norm_epsilon, False) if has_norm else None
        self.carried_channels = model.carried_channels(place)
        if shared is None:
            context = LayerContext(hidden_size, before, total, megatron)
            shared = self.shared = nn.ModuleDict(shared_modules([model.blocks[name] for name in names], context))
        share(self.layers, shared)

    def forward(
        self,
        hidden: Tensor,
        states: dict[str, State] | None,
        documents: Documents | None,
        name: str,
        carried: Carried | None = None,
    ) -> tuple[Tensor, Carried, dict[str, State]]:
        """The network, or this part of it.

        Args:
            hidden, documents: as for a block.
            states: those of blocks are under ``name.INDEX``.
            carried: by the part before this; None where the network begins.

        Returns:
            Hidden states of the same shape, what is carried on, and the blocks' states named as in ``states``.
        """
        final: dict[str, State] = {}
        if carried is None:
            carried = initial_carried(hidden, self.carried_channels, documents)
        for index, block in enumerate(self.layers):
            key = f"{name}.{index}"
            state = None if states is None else states.get(key)
            if self.recomputes and torch.is_grad_enabled():
                hidden, state, carried = checkpoint(block, hidden, state, documents, carried, use_reentrant=False)
            else:
                hidden, state, carried = block(hidden, state, documents, carried)
            if state is not None:
                final[key] = state
        return hidden if self.norm is None else self.norm(hidden), carried, final
