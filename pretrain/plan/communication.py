"""What a rank sends in an optimizer step, by purpose, from the configuration alone. Imports no torch.

Derived from the calls that send it: Megatron-core's mappings, layers, cross-entropy and 1F1B schedule; DeepSpeed's ZeRO
with float32 gradients and weights; ``pretrain.parallel.engine``; the mixers' own. ``tests/plan/test_communication.py``
counts those calls. Left out is what no model's size changes: counts, norms and flags of a few bytes.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.config.schema import Config
from pretrain.models.mixer_config import MixerConfig
from pretrain.models.registry import family_of
from pretrain.models.tensor_messages import Collective, TensorMessage, said_again
from pretrain.plan.context import plan_context
from pretrain.plan.costs import BYTES_PER_ELEMENT, FLOAT32, used_blocks
from pretrain.plan.stages import Stage

# DeepSpeed's defaults for ZeRO-3, in elements: a smaller parameter stays whole, and one that is used again within so
# many elements stays gathered until then.
PERSISTENT_PARAMETER = 100_000
REUSE_DISTANCE = 1_000_000_000

# What a rank sends for each byte of a tensor among n ranks, by the algorithms that NCCL takes for large ones.
SHARES: dict[Collective, Any] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "all_to_all": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: (ranks - 1) / ranks,
    "send": lambda ranks: 1.0,
}

PURPOSES = {
    "tensor": "tensor-parallel ranks: sums of what layers write and of gradients of what they read",
    "sequence": "sequence parallelism: positions gathered for products, sums scattered",
    "pipeline": "hidden states to the next stage, gradients to the one before, sums of what stages share",
    "context": "what ranks with other segments of the sequences are told of them",
    "expert": "rows of tokens to their experts and back",
    "data": "gradients of the ranks that hold the same weights, and the weights that ZeRO splits",
}


@dataclass(frozen=True)
class Traffic:
    """Collective calls of one kind, of one rank in one optimizer step.

    Attributes:
        purpose: key of :data:`PURPOSES`.
        collective: what is called.
        group: whose ranks take part: ``tensor``, ``context``, ``expert``, ``copies`` (all that hold the same weights),
            ``expert_copies`` (the same experts), ``pipeline``, or ``embedding`` (first and last stage).
        ranks: in a group.
        bytes: of the whole tensors that the calls reduce, gather, scatter or send, all together.
        overlaps: whether products go on meanwhile.
    """

    purpose: str
    collective: Collective
    group: str
    ranks: int
    bytes: float
    overlaps: bool = False

    @property
    def sent(self) -> float:
        """Bytes that the rank sends for them."""
        return self.bytes * SHARES[self.collective](self.ranks)


def stage_traffic(stage: Stage) -> list[Traffic]:
    """What a rank of a pipeline stage sends in an optimizer step; of each purpose, call and group one entry."""
    found: Counter[tuple[str, Collective, str, int, bool]] = Counter()
    for traffic in _all_traffic(stage):
        if traffic.ranks > 1 and traffic.bytes:
            key = (traffic.purpose, traffic.collective, traffic.group, traffic.ranks, traffic.overlaps)
            found[key] += traffic.bytes
    entries = [Traffic(*key[:4], size, key[4]) for key, size in found.items()]
    return sorted(entries, key=lambda entry: (list(PURPOSES).index(entry.purpose), -entry.sent))


def _all_traffic(stage: Stage) -> Iterator[Traffic]:
    yield from _of_layers(stage)
    yield from _of_vocabulary(stage)
    yield from _of_partial_gradients(stage)
    yield from _between_stages(stage)
    yield from _of_copies(stage)
    config, micro_batches = stage.config, stage.micro_batches
    context = plan_context(config, micro_batches)
    if context is not None:
        yield Traffic("context", "send", "context", config.parallel.context, context.bytes_per_step)


def _traffic(config: Config, message: TensorMessage, positions: float) -> Traffic:
    parallel = config.parallel
    size = message.bytes * positions
    if message.group == "expert":
        return Traffic("expert", message.collective, "expert", parallel.expert, size)
    purpose = "tensor" if message.collective == "all_reduce" or not parallel.sequence else "sequence"
    return Traffic(purpose, message.collective, "tensor", parallel.tensor, size)


@functools.lru_cache(maxsize=4096)
def _bytes_of_block(
    sections: tuple[MixerConfig, ...],
    hidden_size: int,
    element: int,
    tensor: int,
    sequence: bool,
    expert: int,
    again: bool,
) -> list[TensorMessage]:
    """What a block's ranks say of each position, forward and backward together, one message of each kind."""
    messages: list[TensorMessage] = []
    for section in sections:
        messages += family_of(section).tensor_messages(section, hidden_size, element, tensor, sequence)
    sizes = {"tensor": tensor, "expert": expert}
    messages = [message for message in messages if sizes[message.group] > 1]
    found: Counter[tuple[Any, Any]] = Counter()
    for message in messages + (said_again(messages) if again else []):
        found[message.collective, message.group] += message.bytes
    return [TensorMessage(collective, size, group=group) for (collective, group), size in found.items()]


def _of_layers(stage: Stage) -> Iterator[Traffic]:
    config, parallel = stage.config, stage.config.parallel
    if parallel.tensor == parallel.expert == 1:
        return
    element, again = BYTES_PER_ELEMENT[config.train.precision], config.train.recompute == "block"
    for used in used_blocks(config, parallel.stage_layers(config.model.num_layers)[stage.index]):
        block = config.model.blocks[used.name]
        sections = tuple(section for section in (block.mixer, block.channel) if section is not None)
        positions = stage.tokens * stage.micro_batches * used.positions_per_token * used.count
        for message in _bytes_of_block(
            sections, used.hidden_size, element, parallel.tensor, parallel.sequence, parallel.expert, again
        ):
            yield _traffic(config, message, positions)


def _of_vocabulary(stage: Stage) -> Iterator[Traffic]:
    """Embedding, head and cross-entropy, whose rows tensor-parallel ranks split."""
    config = stage.config
    parallel, width = config.parallel, config.model.embedding_size
    if parallel.tensor == 1:
        return
    element, messages = BYTES_PER_ELEMENT[config.train.precision], []
    if stage.index == 0:
        # Megatron-core's embedding is summed in its weight's dtype.
        size = float(width * FLOAT32)
        if parallel.sequence:
            messages += [TensorMessage("reduce_scatter", size), TensorMessage("all_gather", size, backward=True)]
        else:
            messages += [TensorMessage("all_reduce", size)]
    if stage.is_last:
        size = float(width * element)
        if parallel.sequence:
            messages += [TensorMessage("all_gather", size)] * 2 + [TensorMessage("reduce_scatter", size)]
        else:
            messages += [TensorMessage("all_reduce", size, backward=True)]
        # Of each position the largest logit, that of its label, and the sum of exponentials.
        messages += [TensorMessage("all_reduce", float(FLOAT32))] * 3
    for message in messages:
        yield _traffic(config, message, stage.tokens * stage.micro_batches)


def _of_partial_gradients(stage: Stage) -> Iterator[Traffic]:
    """Gradients of replicated parameters of which each tensor-parallel rank knows a part."""
    parallel = stage.config.parallel
    if parallel.tensor == 1:
        return
    partial = 0
    for layer in stage.layers:
        partial += layer.norms * layer.hidden_size if parallel.sequence else 0
        for mixer in layer.mixers:
            partial += mixer.parameters_replicated if parallel.sequence else mixer.parameters_partial
            partial += mixer.parameters_grouped if mixer.parameter_groups % parallel.tensor else 0
    if parallel.sequence:
        partial += stage.shared + (stage.config.model.embedding_size if stage.is_last else 0)
    times = stage.micro_batches if parallel.zero >= 2 else 1
    yield Traffic("tensor", "all_reduce", "tensor", parallel.tensor, FLOAT32 * partial * times)


def _between_stages(stage: Stage) -> Iterator[Traffic]:
    config = stage.config
    stages, model = config.parallel.pipeline, config.model
    if stages == 1:
        return
    element = BYTES_PER_ELEMENT[config.train.precision]
    size = model.hidden_size * element + FLOAT32 * sum(model.carried_channels().values())
    positions = stage.tokens * stage.micro_batches / (config.parallel.tensor if config.parallel.sequence else 1)
    neighbours = (stage.index > 0) + (not stage.is_last)
    yield Traffic("pipeline", "send", "pipeline", stages, size * positions * neighbours)
    if model.tie_embeddings and (stage.index == 0 or stage.is_last):
        yield Traffic("pipeline", "all_reduce", "embedding", 2, FLOAT32 * stage.head_parameters)
    yield Traffic("pipeline", "all_reduce", "pipeline", stages, FLOAT32 * stage.shared)


def _of_copies(stage: Stage) -> Iterator[Traffic]:
    """Gradients and weights of ranks that hold the same ones; experts over those ranks alone that hold them."""
    parallel, micro_batches = stage.config.parallel, stage.micro_batches
    if parallel.zero == 3:
        # Both are sent while the layers before or behind compute; expert parallelism is not there.
        size = float(FLOAT32 * stage.parameters * micro_batches)
        yield Traffic("data", "reduce_scatter", "copies", stage.copies, size, overlaps=True)
        gathered = float(FLOAT32 * gathered_elements(stage))
        yield Traffic("data", "all_gather", "copies", stage.copies, gathered, overlaps=True)
        return
    routed = stage.routed if parallel.expert > 1 else 0
    groups = {
        "copies": (stage.parameters - routed, stage.copies),
        "expert_copies": (routed, stage.copies // parallel.expert),
    }
    for group, (parameters, ranks) in groups.items():
        size = float(FLOAT32 * parameters)
        # DeepSpeed sums whole gradients on every rank, of which each then takes its part: at stage 1 once a step, at
        # stage 2 those of every micro-batch.
        yield Traffic("data", "all_reduce", group, ranks, size * (micro_batches if parallel.zero == 2 else 1))
        if parallel.zero:
            yield Traffic("data", "all_gather", group, ranks, size)


def gathered_elements(
    stage: Stage, persistent: int = PERSISTENT_PARAMETER, reuse_distance: int = REUSE_DISTANCE
) -> float:
    """Elements of weights that ZeRO-3 gathers in a step.

    Parameters that stay whole are gathered once, after the update. The others are gathered for each forward and
    backward pass, but for those that the backward pass reaches soon after the forward pass. A block that is computed
    again is small enough to stay gathered until its backward pass.

    Args:
        persistent: elements of a parameter below which it stays whole; a layer's weights are taken to have the square
            of the width.
        reuse_distance: elements within which a parameter stays gathered.
    """
    model, tensor = stage.config.model, stage.config.parallel.tensor
    in_layers = model.hidden_size**2 / tensor >= persistent
    vocabulary = stage.head_parameters * (1 if model.tie_embeddings else 2)
    vocabulary_is_large = stage.head_parameters >= persistent
    large = (stage.parameters - vocabulary) * in_layers + vocabulary * vocabulary_is_large
    # What lies between: the rest of the forward pass and what of the backward pass comes first.
    passes = 3 if stage.config.train.recompute == "block" else 2
    once = min(large, reuse_distance / passes)
    return stage.parameters - large + stage.micro_batches * (2 * large - once)


def heaviest_traffic(stages: Sequence[Stage]) -> list[Traffic]:
    """Of the pipeline stage whose ranks send most."""
    return max((stage_traffic(stage) for stage in stages), key=lambda entries: sum(entry.sent for entry in entries))
