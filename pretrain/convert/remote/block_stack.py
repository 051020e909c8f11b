"""Blocks that hierarchies put round their layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pretrain.models.modeling import NORMS, Carried, State

from .configuration_recurrent import RecurrentConfig
from .modeling_recurrent import RecurrentBlock, initial_carried, share, shared_modules

NamedStates = dict[str, State | None]


class BlockStack(nn.Module):
    """Blocks one after the other, and a norm behind them where there is one: a network, or a part of one.

    A part is given what the blocks of its network share.
    """

    def __init__(
        self,
        config: RecurrentConfig,
        names: Sequence[str],
        hidden_size: int,
        has_norm: bool,
        shared: nn.ModuleDict | None = None,
    ):
        super().__init__()
        self.layers = nn.ModuleList(RecurrentBlock(config, config.blocks[name], hidden_size) for name in names)
        self.norm = NORMS[config.norm](hidden_size, config.norm_epsilon) if has_norm else None

        if shared is None:
            shared = self.shared = shared_modules(config, names, hidden_size)
        share(self.layers, shared)

    def forward(
        self, hidden: Tensor, states: NamedStates | None, name: str, carried: Carried | None = None
    ) -> tuple[Tensor, Carried, NamedStates]:
        """Maps ``(batch, sequence, hidden_size)`` to the same shape; states are named ``name.INDEX``.

        ``carried``: by the part of the network before this one; None where it begins.
        """
        final: NamedStates = {}
        if carried is None:
            carried = initial_carried(hidden, self.layers)
        for index, block in enumerate(self.layers):
            key = f"{name}.{index}"
            hidden, final[key], carried = block(hidden, None if states is None else states[key], carried)
        return hidden if self.norm is None else self.norm(hidden), carried, final
