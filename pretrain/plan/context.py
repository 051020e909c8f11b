"""What ranks that hold segments of the same sequences send each other in a step. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config.model import BlockConfig
from pretrain.config.schema import Config
from pretrain.models.mixer_config import MixerConfig
from pretrain.models.registry import family_of
from pretrain.models.segment_messages import exchanged, handed_on, kept
from pretrain.plan.costs import BYTES_PER_ELEMENT, mixer_cost


@dataclass(frozen=True)
class LayerTraffic:
    """What one rank receives for one layer and micro-batch, forward and backward, averaged over the ranks of a group.

    Attributes:
        mixer: its type.
        layers: how many layers of the model are of this kind.
        scheme: ``chain``, ``gather`` or ``scan``.
        messages, bytes: received.
    """

    mixer: str
    layers: int
    scheme: str
    messages: float
    bytes: float


@dataclass(frozen=True)
class ContextPlan:
    """What context parallelism sends.

    Attributes:
        segment_length: tokens of each sequence that a rank holds.
        layers: one entry for each kind of layer.
        bytes_per_step: that a rank of the pipeline stage with most layers receives in an optimizer step.
    """

    segment_length: int
    layers: list[LayerTraffic]
    bytes_per_step: float


def segment_length(config: Config) -> int:
    """Tokens of each sequence that a rank holds, padding included."""
    return config.parallel.segment_length(config.data.sequence_length)


def kept_bytes(block: BlockConfig, config: Config) -> float:
    """What the last rank of a group keeps for the backward pass of what others said, of one sequence and layer."""
    mixer, ranks, length = block.mixer, config.parallel.context, segment_length(config)
    if ranks == 1 or mixer is None:
        return 0.0
    if config.context_scheme == "chain" or not mixer.exchanges_segments:
        return float(_state_bytes(mixer, config, length * (ranks - 1)))
    element = BYTES_PER_ELEMENT[config.train.precision]
    family, width = family_of(mixer), config.model.hidden_size
    said = kept(family.segment_messages(mixer, width, length, element), config.context_scheme, ranks)
    return said + family.kept_beside_messages(mixer, width, length, ranks, element)


def plan_context(config: Config, micro_batches: int) -> ContextPlan | None:
    """What a run's context-parallel ranks receive; None where there is one.

    Args:
        micro_batches: of a rank in an optimizer step.
    """
    if config.parallel.context == 1:
        return None
    model = config.model
    repeats = model.num_layers // len(model.layers)
    layers = {
        name: _of_layers(model.blocks[name].mixer, repeats * model.layers.count(name), config)
        for name in dict.fromkeys(model.layers)
        if model.blocks[name].mixer is not None
    }
    of_layers = [layers[name].bytes if name in layers else 0.0 for name in model.layers * repeats]
    stages = config.parallel.stage_layers(model.num_layers)
    in_a_step = max(sum(of_layers[layer] for layer in stage) for stage in stages) * micro_batches
    return ContextPlan(segment_length(config), list(layers.values()), in_a_step)


def _of_layers(mixer: MixerConfig, layers: int, config: Config) -> LayerTraffic:
    ranks, length = config.parallel.context, segment_length(config)
    scheme = config.context_scheme if mixer.exchanges_segments else "chain"
    if scheme == "chain":
        of_sequence = handed_on([_state_bytes(mixer, config, length * count) for count in range(1, ranks)])
    else:
        element = BYTES_PER_ELEMENT[config.train.precision]
        messages = family_of(mixer).segment_messages(mixer, config.model.hidden_size, length, element)
        of_sequence = exchanged(messages, scheme, ranks)
        if config.train.recompute == "block":
            # What is computed again is asked for again.
            of_sequence += exchanged([message.forward_only() for message in messages], scheme, ranks)
    # A micro-batch's sequences are in one message.
    size = of_sequence.bytes * config.train.micro_batch_size / config.parallel.tensor
    return LayerTraffic(mixer.type, layers, scheme, of_sequence.messages / ranks, size / ranks)


def _state_bytes(mixer: MixerConfig, config: Config, tokens: int) -> int:
    """Of one sequence after so many tokens."""
    return mixer_cost(mixer, config, config.model.hidden_size, tokens).state_bytes
