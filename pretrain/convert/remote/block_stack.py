"""Blocks that hierarchies put round their layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pretrain.models.modeling import NORMS, State

from .configuration_recurrent import RecurrentConfig
from .modeling_recurrent import RecurrentBlock

NamedStates = dict[str, State | None]


class BlockStack(nn.Module):
    """Blocks one after the other, and a norm behind them where there is one."""

    def __init__(self, config: RecurrentConfig, names: Sequence[str], hidden_size: int, has_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(RecurrentBlock(config, config.blocks[name], hidden_size) for name in names)
        self.norm = NORMS[config.norm](hidden_size, config.norm_epsilon) if has_norm else None

    def forward(self, hidden: Tensor, states: NamedStates | None, name: str) -> tuple[Tensor, NamedStates]:
        """Maps ``(batch, sequence, hidden_size)`` to the same shape; states are named ``name.INDEX``."""
        final: NamedStates = {}
        for index, block in enumerate(self.layers):
            key = f"{name}.{index}"
            hidden, final[key], _ = block(hidden, None if states is None else states[key], {})
        return hidden if self.norm is None else self.norm(hidden), final
