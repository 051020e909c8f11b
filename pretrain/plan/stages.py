"""Bytes on a rank, part by part, from the configuration alone.

What the parts rest on: weights are float32 on every rank and split by tensor and pipeline parallelism, and over
data-parallel ranks only by ZeRO-3; gradients are float32; AdamW keeps two float32 moments; ZeRO 1 and 2 keep
another float32 copy of the partition that a rank updates. Activations are in ``train.precision``. At which moment of
a step a rank holds most, and what of these it then holds, is worked out in :mod:`pretrain.plan.peak`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pretrain.config.schema import Config
from pretrain.plan.context import segment_length
from pretrain.plan.layer_bytes import LayerBytes, layer_bytes
from pretrain.plan.layers import BlockCost, shared_parameters
from pretrain.plan.teacher import TeacherCost

# DeepSpeed's defaults, in elements: its gradient bucket, and the most weights that ZeRO-3 keeps gathered and
# updates in one piece.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Stage:
    """One pipeline stage on one rank: its layers, its place, the batch that it sees, and what all layers share.

    Attributes:
        layers: in the order of :func:`layer_costs`.
        first_layer: index of the first of them in the model.
        shared: parameters that layers share, see :func:`shared_parameters`.
        teacher: that the rank holds beside them; None where there is none.
    """

    config: Config
    layers: list[BlockCost]
    index: int
    data_size: int
    shared: int = 0
    first_layer: int = 0
    teacher: TeacherCost | None = None

    @property
    def is_last(self) -> bool:
        return self.index == self.config.parallel.pipeline - 1

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch that one rank holds."""
        return self.config.train.micro_batch_size * segment_length(self.config)

    @property
    def copies(self) -> int:
        """Ranks that hold the same weights."""
        return self.data_size * self.config.parallel.context

    @property
    def rows(self) -> int:
        """Sequences of the global batch that this rank reads, all micro-batches together."""
        return self.config.train.global_batch_size // self.data_size

    @property
    def micro_batches(self) -> int:
        """Of this rank in an optimizer step."""
        return self.rows // self.config.train.micro_batch_size

    @property
    def micro_batches_in_flight(self) -> int:
        """Micro-batches whose activations 1F1B keeps at once (Narayanan et al. 2021, arXiv 2104.04473)."""
        return min(self.micro_batches, self.config.parallel.pipeline - self.index)

    @property
    def head_parameters(self) -> int:
        return -(-self.config.model.vocab_size // self.config.parallel.tensor) * self.config.model.embedding_size

    def under(self, config: Config) -> Stage:
        """The same layers cut the same way, under another ZeRO stage, batch or recomputation; counts are kept."""
        other = replace(self, config=config)
        vars(other).update({name: getattr(self, name) for name in ("parameters", "routed", "layer_bytes")})
        return other

    @functools.cached_property
    def layer_bytes(self) -> list[LayerBytes]:
        """What each layer holds, in the order of the forward pass."""
        return layer_bytes(self.config, self.layers, self.first_layer)

    @functools.cached_property
    def parameters(self) -> int:
        """Parameters of this rank's part of the model, before ZeRO splits anything."""
        parallel = self.config.parallel
        total = sum(layer.parameters_per_rank(parallel.tensor, parallel.expert) for layer in self.layers)
        total += self.shared
        first, last = self.index == 0, self.is_last
        # A tied embedding stands once on a stage, though it is both; first and last stage each have their copy.
        tied_on_one_stage = first and last and self.config.model.tie_embeddings
        total += self.head_parameters * (1 if tied_on_one_stage else first + last)
        if last:
            total += self.config.model.embedding_size
        return total

    @functools.cached_property
    def routed(self) -> int:
        """Those of :attr:`parameters` that belong to routed experts."""
        parallel = self.config.parallel
        mixers = [mixer for layer in self.layers for mixer in layer.mixers]
        return sum(mixer.routed_per_rank(parallel.tensor, parallel.expert) for mixer in mixers)

    @property
    def partition(self) -> int:
        """Parameters of one rank once ZeRO has split them: experts over those ranks alone that hold them."""
        routed = self.routed
        return -(-(self.parameters - routed) // self.copies) + -(-routed * self.config.parallel.expert // self.copies)


def pipeline_stages(
    config: Config, layers: list[BlockCost], data_size: int, teacher: TeacherCost | None = None
) -> list[Stage]:
    """A rank of each pipeline stage.

    Args:
        layers: of the whole model, as :func:`layer_costs` gives them.
        data_size: data-parallel ranks.
        teacher: of a run that has one.
    """
    shared = shared_parameters(layers)
    # A hierarchy's outer stages stand behind its layers, all on one stage.
    held = config.parallel.stage_layers(len(layers)) if config.parallel.pipeline > 1 else [range(len(layers))]
    return [
        Stage(config, layers[on.start : on.stop], index, data_size, shared, on.start, teacher)
        for index, on in enumerate(held)
    ]
