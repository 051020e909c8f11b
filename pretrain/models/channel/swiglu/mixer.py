"""SwiGLU, split over tensor-parallel ranks by inner channels."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.models.channel.swiglu.config import SwiGLUConfig
from pretrain.models.linear import ColumnParallelProjections, Projection, RowParallelProjection
from pretrain.models.mixer import ChannelMixer, LayerContext
from pretrain.models.parameters import ParameterSpec, small_normal, wang_normal


class SwiGLU(ChannelMixer):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: SwiGLUConfig, context: LayerContext):
        super().__init__()
        self.config = config
        width, inner = context.hidden_size, config.inner_size(context.hidden_size)
        into = ParameterSpec(small_normal(width), shard_dimension=0)
        self.projections = ColumnParallelProjections(
            width, {"gate": Projection(inner, into), "up": Projection(inner, into)}, context.megatron
        )
        back = ParameterSpec(wang_normal(width, context.num_layers), shard_dimension=1)
        self.down = RowParallelProjection(inner, width, back, context.megatron)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.projections(hidden)
        return self.down(nn.functional.silu(gate) * up)


MIXER = SwiGLU
