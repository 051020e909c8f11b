"""One layer of the decoder: a sequence mixer, a channel mixer, or both, each behind a norm and added to its input."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.config.model import BlockConfig, ModelConfig
from pretrain.models.mixer import Carried, Documents, LayerContext, State
from pretrain.models.norm import NORMS
from pretrain.models.registry import family_of


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + channel(norm(x))``."""

    def __init__(self, config: BlockConfig, model: ModelConfig, context: LayerContext):
        super().__init__()
        norm, sizes = NORMS[model.norm], (context.hidden_size, model.norm_epsilon, context.megatron.sequence_parallel)
        self.mixer = self.channel = None
        self.carries = config.channel is not None and bool(config.channel.carried(context.hidden_size))
        if config.mixer is not None:
            self.mixer_norm = norm(*sizes)
            self.mixer = family_of(config.mixer).module(config.mixer, context)
        if config.channel is not None:
            self.channel_norm = norm(*sizes)
            self.channel = family_of(config.channel).module(config.channel, context)

    def forward(
        self, hidden: Tensor, state: State | None, documents: Documents | None, carried: Carried | None = None
    ) -> tuple[Tensor, State | None, Carried]:
        """Hidden states of the same shape, the mixer's state (None where there is no mixer), and what is carried on."""
        carried = carried or {}
        if self.mixer is not None:
            mixed, state = self.mixer(self.mixer_norm(hidden), state, documents)
            hidden = hidden + mixed
        if self.channel is not None:
            normed = self.channel_norm(hidden)
            if self.carries:
                mixed, carried = self.channel(normed, carried)
            else:
                mixed = self.channel(normed)
            hidden = hidden + mixed
        return hidden, state, carried


def metric_reductions(model: ModelConfig) -> dict[str, str]:
    """How each figure that the model and its mixers report combines over layers and ranks: max, sum or mean.

    The same on every rank, whatever layers its stage holds.
    """
    reductions: dict[str, str] = {}
    for block in model.blocks.values():
        for config in (block.mixer, block.channel):
            if config is not None:
                reductions |= family_of(config).module.METRICS
    if model.hierarchy is not None:
        reductions |= model.hierarchy.metric_reductions()
    return dict(sorted(reductions.items()))
