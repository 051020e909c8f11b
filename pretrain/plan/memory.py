"""Bytes on a rank, part by part, from the configuration alone.

What the parts rest on: weights are float32 on every rank and split by tensor and pipeline parallelism, and over
data-parallel ranks only by ZeRO-3; gradients are float32; AdamW keeps two float32 moments; ZeRO 1 and 2 keep
another float32 copy of the partition that a rank updates. Activations are in ``train.precision``. Every figure
is of the moment at which a rank holds most, which is either late in a backward pass or in the optimizer's step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pretrain.config.carried_states import bytes_after_any_length
from pretrain.config.schema import BlockConfig, Config
from pretrain.models.registry import HierarchyConfig, MixerCost, hierarchy_of
from pretrain.plan.context import kept_bytes, segment_length
from pretrain.plan.costs import BYTES_PER_ELEMENT, mixer_cost

FLOAT32 = 4

# DeepSpeed's defaults, in elements: its gradient bucket, and the most weights that ZeRO-3 keeps gathered and
# updates in one piece.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000

PARTS = {
    "weights": "float32 weights, their own master copies",
    "gradients": "float32 gradients",
    "optimizer_moments": "both moments of AdamW, float32",
    "partition_copy": "ZeRO 1 and 2: float32 copy of the weights that this rank updates",
    "gathered_weights": "ZeRO 3: weights gathered for the layers in use",
    "communication_buffers": "ZeRO 2 and 3: bucket of gradients on their way to their ranks",
    "activations": "kept from the forward for the backward pass, all micro-batches in flight",
    "logits": "float32 logits, their softmax and gradient",
    "states": "recurrent states before the first token, which cells keep for the backward pass, and what ranks with "
    "other segments of the sequences said of them",
    "carried_states": "recurrent states of all of the rank's rows, those of the step before and those of this one",
    "working": "held only while one layer runs backward: cast weights, their gradients, the layer's own",
    "optimizer_step": "what the optimizer's step needs beyond what the backward pass has freed by then",
}


@dataclass(frozen=True)
class BlockCost:
    """A residual block: its mixers' costs, how many norms there are, and its state before the first token.

    Attributes:
        positions_per_token: how many positions it has for each token that is read; below 1 within a hierarchy.
        norms: as many as mixers, each before one, unless it is a joint.
        place: the network that it belongs to, whose layers share modules; see ``registry.OuterBlock``.
        carried_channels: float32 channels per position that its network hands from layer to layer.
        kept_of_segments: bytes that the last of several ranks keeps of what others said of a sequence.
        is_joint: it is no block, but what joins two stages of a hierarchy: never computed again in the backward pass.
        carried_state_bytes: state of one row that goes on from step to step; 0 where rows begin anew.
    """

    mixers: tuple[MixerCost, ...]
    hidden_size: int
    initial_state_bytes: int
    positions_per_token: float
    norms: int
    place: str = "layers"
    carried_channels: int = 0
    is_joint: bool = False
    kept_of_segments: float = 0.0
    carried_state_bytes: int = 0

    @property
    def parameters(self) -> int:
        return sum(mixer.parameters for mixer in self.mixers) + self.norms * self.hidden_size

    @property
    def active_parameters(self) -> int:
        return sum(mixer.active_parameters for mixer in self.mixers) + self.norms * self.hidden_size

    def parameters_per_rank(self, tensor: int, expert: int = 1) -> int:
        """Parameters on one of ``tensor`` tensor-parallel and ``expert`` expert-parallel ranks."""
        mixers = sum(mixer.parameters_per_rank(tensor, expert) for mixer in self.mixers)
        return mixers + self.norms * self.hidden_size

    def input_bytes(self, bytes_per_element: int) -> float:
        """What a block reads, hidden states and what is carried beside them, per token read."""
        return self.positions_per_token * (self.hidden_size * bytes_per_element + FLOAT32 * self.carried_channels)

    def activation_bytes_per_token(self, config: Config) -> float:
        """Kept for the backward pass by one tensor-parallel rank when nothing is recomputed, per token read."""
        tensor = config.parallel.tensor
        # Each norm keeps its input in float32; its result is kept by the projections that read it.
        norm = self.hidden_size * (FLOAT32 + BYTES_PER_ELEMENT[config.train.precision])
        norm /= tensor if config.parallel.sequence else 1
        # A joint's work is not split.
        split = 1 if self.is_joint else tensor
        mixers = sum(mixer.activation_bytes_per_rank(split, config.parallel.sequence) for mixer in self.mixers)
        return self.positions_per_token * (self.norms * norm + mixers)


def block_cost(
    block: BlockConfig, config: Config, hidden_size: int, positions_per_token: float, place: str
) -> BlockCost:
    """Costs of a block's mixers in a network, at its width and the configuration's sequence length and precision."""
    sections = [section for section in (block.mixer, block.channel) if section is not None]
    length = max(1, round(config.data.sequence_length * positions_per_token))
    mixers = tuple(mixer_cost(section, config, hidden_size, length) for section in sections)
    # Extrapolated from one and two tokens: a cache that grows with every token is empty before the first.
    states = [
        sum(mixer_cost(section, config, hidden_size, length).state_bytes for section in sections) for length in (1, 2)
    ]
    carried = None
    if config.train.carry_state and block.mixer is not None:
        carried = bytes_after_any_length(block.mixer, hidden_size, config.model.num_layers)
    return BlockCost(
        mixers,
        hidden_size,
        2 * states[0] - states[1],
        positions_per_token,
        len(mixers),
        place=place,
        carried_channels=sum(config.model.carried_channels(place).values()),
        kept_of_segments=kept_bytes(block, config),
        carried_state_bytes=carried or 0,
    )


def layer_costs(config: Config) -> list[BlockCost]:
    """One :class:`BlockCost` for each layer of the model, in order; behind them those of a hierarchy's outer stages."""
    model = config.model
    positions = 1.0 if model.hierarchy is None else model.hierarchy.inner_positions_per_token
    by_name = {
        name: block_cost(model.blocks[name], config, model.hidden_size, positions, "layers")
        for name in set(model.layers)
    }
    costs = [by_name[model.layers[layer % len(model.layers)]] for layer in range(model.num_layers)]
    return costs if model.hierarchy is None else costs + _outer_costs(config, model.hierarchy)


def _outer_costs(config: Config, hierarchy: HierarchyConfig) -> list[BlockCost]:
    element, costs = BYTES_PER_ELEMENT[config.train.precision], []
    for outer in hierarchy_of(hierarchy).outer_costs(hierarchy, config.model.hidden_size, element):
        size, positions = outer.hidden_size, outer.positions_per_token
        if outer.joint is None:
            costs.append(block_cost(config.model.blocks[outer.block], config, size, positions, outer.place))
        else:
            costs.append(BlockCost((outer.joint,), size, 0, positions, outer.norms, is_joint=True))
    return costs


def shared_parameters(layers: list[BlockCost]) -> int:
    """Parameters that layers share, each network's counted once; every pipeline stage holds a copy."""
    shared: dict[tuple[str, str], int] = {}
    for layer in layers:
        for mixer in layer.mixers:
            shared |= {(layer.place, name): count for name, count in mixer.shared_parameters.items()}
    return sum(shared.values())


@dataclass(frozen=True)
class Stage:
    """One pipeline stage on one rank: its layers, its place, the batch that it sees, and what all layers share."""

    config: Config
    layers: list[BlockCost]
    index: int
    data_size: int
    shared: int = 0

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
        vars(other).update({name: getattr(self, name) for name in ("parameters", "routed")})
        return other

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

    def activation_bytes(self, recompute: str) -> int:
        """Activations of every micro-batch in flight, under one setting of ``train.recompute``."""
        parallel = self.config.parallel
        element = BYTES_PER_ELEMENT[self.config.train.precision]
        split = parallel.tensor if parallel.sequence else 1
        whole = [layer.activation_bytes_per_token(self.config) for layer in self.layers]
        if recompute == "block":
            # Every block keeps its input, and what is carried beside it; the one that runs backward has all of its own
            # again.
            kept = [
                size if layer.is_joint else layer.input_bytes(element) / split
                for layer, size in zip(self.layers, whole, strict=True)
            ]
            per_token = self.micro_batches_in_flight * sum(kept)
            per_token += max(size for layer, size in zip(self.layers, whole, strict=True) if not layer.is_joint)
        else:
            per_token = self.micro_batches_in_flight * sum(whole)
        if self.is_last:
            per_token += self.config.model.embedding_size * (FLOAT32 + element) / split
        return int(self.tokens * per_token)

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of each of :data:`PARTS` on this rank; their sum is the most it holds at once."""
        zero, parameters = self.config.parallel.zero, self.parameters
        partition = self.partition
        bucket = min(REDUCE_BUCKET, parameters) if self.copies > 1 else 0
        elements = {
            "weights": partition if zero == 3 else parameters,
            "gradients": partition if zero >= 2 else parameters,
            "optimizer_moments": 2 * (partition if zero else parameters),
            "partition_copy": partition if zero in (1, 2) else 0,
            "gathered_weights": min(parameters, LIVE_PARAMETERS) if zero == 3 else 0,
            "communication_buffers": bucket if zero >= 2 else 0,
        }
        parts = {name: count * FLOAT32 for name, count in elements.items()}
        backward = {
            "activations": self.activation_bytes(self.config.train.recompute),
            "logits": self._logit_bytes() if self.is_last else 0,
            "states": self._state_bytes(),
            "working": self._working_bytes(),
        }
        parts.update(backward)
        carried = sum(layer.carried_state_bytes for layer in self.layers) // self.config.parallel.tensor
        parts["carried_states"] = 2 * self.rows * carried
        parts["optimizer_step"] = max(0, self._optimizer_step_bytes(partition, bucket) - sum(backward.values()))
        return parts

    def _logit_bytes(self) -> int:
        per_token = self.config.model.vocab_size / self.config.parallel.tensor
        if self.config.model.output_logit_soft_cap is None:
            copies = FLOAT32 + BYTES_PER_ELEMENT[self.config.train.precision]
        else:
            # tanh's result, and the gradient before and after it, of which one took the softmax's place.
            copies = 3 * FLOAT32
        return int(self.tokens * per_token * copies)

    def _state_bytes(self) -> int:
        of_layers = [layer.kept_of_segments for layer in self.layers]
        is_kept = self.config.train.recompute == "none"
        kept = sum(of_layers) * self.micro_batches_in_flight if is_kept else max(of_layers)
        # The chunks of a micro-batch stand in one row, which begins with one state.
        rows = self.config.train.micro_batch_size
        states = sum(
            max(layer.initial_state_bytes, layer.carried_state_bytes) * (rows if layer.positions_per_token == 1 else 1)
            for layer in self.layers
        )
        return int((states + kept * self.config.train.micro_batch_size) / self.config.parallel.tensor)

    def _working_bytes(self) -> int:
        """Of the layer, or of the head, that needs most."""
        tensor, element = self.config.parallel.tensor, BYTES_PER_ELEMENT[self.config.train.precision]
        expert, tokens = self.config.parallel.expert, self.tokens
        weight = element if element != FLOAT32 else 0
        # A product's weight is cast, and its gradient is there in both precisions, until it is added up.
        per_parameter = 2 * weight + FLOAT32
        needed = [
            mixer.working_bytes_per_rank(tensor) * tokens * layer.positions_per_token
            + per_parameter * mixer.parameters_per_rank(tensor, expert)
            for layer in self.layers
            for mixer in layer.mixers
        ]
        if self.is_last:
            needed.append(per_parameter * self.head_parameters)
        return int(max(needed))

    def _optimizer_step_bytes(self, partition: int, bucket: int) -> int:
        """AdamW's square roots beside what brings gradients into place for it."""
        zero = self.config.parallel.zero
        if zero == 0:
            return FLOAT32 * self.parameters
        if zero == 3:
            return FLOAT32 * min(partition, LIVE_PARAMETERS)
        return FLOAT32 * max(2 * partition, bucket if zero == 1 else 0)


def pipeline_stages(config: Config, layers: list[BlockCost], data_size: int) -> list[Stage]:
    """A rank of each pipeline stage.

    Args:
        layers: of the whole model, as :func:`layer_costs` gives them.
        data_size: data-parallel ranks.
    """
    shared = shared_parameters(layers)
    # A hierarchy's outer stages stand behind its layers, all on one stage.
    held = config.parallel.stage_layers(len(layers)) if config.parallel.pipeline > 1 else [range(len(layers))]
    return [Stage(config, layers[on.start : on.stop], index, data_size, shared) for index, on in enumerate(held)]
