"""MLP, split over tensor-parallel ranks by inner channels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pretrain.models.channel.mlp.config import MLPConfig
from pretrain.models.linear import ColumnParallelProjections, Projection, RowParallelProjection
from pretrain.models.mixer import ChannelMixer, LayerContext
from pretrain.models.parameters import ParameterSpec, small_normal, wang_normal


def relu_squared(inputs: Tensor) -> Tensor:
    """``max(x, 0)^2`` (So et al. 2021, "Primer", arXiv 2109.08668)."""
    return nn.functional.relu(inputs).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_squared": relu_squared,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


class MLP(ChannelMixer):
    """``down(activation(up(x)))``, or gated, ``down(activation(gate(x)) * up(x))``."""

    def __init__(self, config: MLPConfig, context: LayerContext):
        super().__init__()
        self.config = config
        self.activation = ACTIVATIONS[config.activation]
        width, inner = context.hidden_size, config.inner_size(context.hidden_size)
        into = Projection(inner, ParameterSpec(small_normal(width), shard_dimension=0))
        names = ("gate", "up") if config.gated else ("up",)
        self.projections = ColumnParallelProjections(width, dict.fromkeys(names, into), context.megatron)
        back = ParameterSpec(wang_normal(width, context.num_layers), shard_dimension=1)
        self.down = RowParallelProjection(inner, width, back, context.megatron)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.config.gated:
            gate, up = self.projections(hidden)
            return self.down(self.activation(gate) * up)
        (up,) = self.projections(hidden)
        return self.down(self.activation(up))


MIXER = MLP
