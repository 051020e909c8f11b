"""The moment of an optimizer step at which a rank holds most, and what it holds then. Imports no torch.

Parts are not all there at the same time: logits are gone before the last layer's backward pass begins, activations go
away layer by layer while gradients come, and the optimizer's step needs none of them. So the moments at which each of
them is largest are looked at one by one, and the largest sum counts:

* the end of a forward pass, with the logits and all that they need;
* the backward pass of the head;
* the backward pass of each mixer of each layer, with what is kept for those before it;
* the backward pass of the embedding;
* the optimizer's step.

Of the micro-batches in flight two are looked at. In the backward pass of the first, gradients do not yet exist of what
comes before in the model, but under ZeRO-3, which makes room for them once; in that of the second all do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.plan.costs import BYTES_PER_ELEMENT, FLOAT32
from pretrain.plan.layer_bytes import LayerBytes
from pretrain.plan.logits import chunked_logit_bytes, logit_bytes
from pretrain.plan.stages import LIVE_PARAMETERS, REDUCE_BUCKET, Stage
from pretrain.plan.teacher import TeacherCost

PARTS = {
    "weights": "float32 weights, their own master copies",
    "gradients": "float32 gradients",
    "optimizer_moments": "both moments of AdamW, float32",
    "partition_copy": "ZeRO 1 and 2: float32 copy of the weights that this rank updates",
    "gathered_weights": "ZeRO 3: weights gathered for the layers in use",
    "communication_buffers": "ZeRO 2 and 3: bucket of gradients on their way to their ranks; sequence parallelism: "
    "hidden states gathered",
    "activations": "kept from the forward for the backward pass, all micro-batches in flight",
    "logits": "float32 logits, their softmax and gradient; where there is a teacher, its own and what compares them",
    "states": "recurrent states before the first token, which cells keep for the backward pass, and what ranks with "
    "other segments of the sequences said of them",
    "carried_states": "recurrent states of all of the rank's rows, those of the step before and those of this one",
    "teacher": "float32 weights of the teacher",
    "working": "held only while one layer runs backward: gradients of what it computes, cast weights, their gradients",
    "optimizer_step": "what the optimizer's step needs beside gradients and moments",
}


# Kinds of moments, in words.
MOMENTS = {
    "teacher": "teacher's forward pass",
    "loss": "loss",
    "backward": "backward passes",
    "optimizer_step": "optimizer's step",
}


class Moment(NamedTuple):
    """What is there at one moment and not at all others, in bytes.

    Attributes:
        kind: key of :data:`MOMENTS`.
        name: in words.
    """

    kind: str
    name: str
    gradients: float
    gathered_weights: float = 0
    activations: float = 0
    logits: float = 0
    states: float = 0
    working: float = 0
    optimizer_step: float = 0
    communication_buffers: float = 0

    @property
    def size(self) -> float:
        """All together."""
        return sum(self[2:])


@dataclass(frozen=True)
class Peak:
    """The most that a rank holds at once.

    Attributes:
        moment: when, in words.
        bytes_by_part: what it then holds, by the keys of :data:`PARTS`.
        bytes_by_kind: the most that it holds at moments of each kind, by the keys of :data:`MOMENTS`.
    """

    moment: str
    bytes_by_part: dict[str, int]
    bytes_by_kind: dict[str, int]

    @property
    def bytes(self) -> int:
        """All parts together."""
        return sum(self.bytes_by_part.values())


def peak(stage: Stage) -> Peak:
    """Of a rank of a pipeline stage."""
    by_kind: dict[str, Moment] = {}
    for moment in moments(stage):
        if moment.kind not in by_kind or moment.size > by_kind[moment.kind].size:
            by_kind[moment.kind] = moment
    most = max(by_kind.values(), key=lambda moment: moment.size)
    always = lasting_bytes(stage)
    parts = {name: int(always.get(name, 0) + getattr(most, name, 0)) for name in PARTS}
    lasting = sum(always.values())
    return Peak(most.name, parts, {kind: int(lasting + moment.size) for kind, moment in by_kind.items()})


def peak_bytes(stage: Stage) -> int:
    """As the sum of :func:`peak`'s parts, to within a byte a part, and faster."""
    return int(sum(lasting_bytes(stage).values()) + max(moment.size for moment in moments(stage)))


def lasting_bytes(stage: Stage) -> dict[str, int]:
    """By part, what is there at every moment."""
    parallel, parameters, partition = stage.config.parallel, stage.parameters, stage.partition
    zero = parallel.zero
    # ZeRO-3's is always there, ZeRO-2's in backward passes alone.
    buffers = FLOAT32 * _bucket(stage) if zero == 3 else 0
    if parallel.sequence:
        element = BYTES_PER_ELEMENT[stage.config.train.precision]
        buffers += element * stage.tokens * stage.config.model.hidden_size
    carried = sum(layer.carried_state_bytes for layer in stage.layers) // parallel.tensor
    return {
        "weights": FLOAT32 * (partition if zero == 3 else parameters),
        "optimizer_moments": 2 * FLOAT32 * (partition if zero else parameters),
        "partition_copy": FLOAT32 * partition if zero in (1, 2) else 0,
        "communication_buffers": buffers,
        "teacher": FLOAT32 * stage.teacher.parameters(parallel.tensor) if stage.teacher else 0,
        "carried_states": 2 * stage.rows * carried,
    }


def _bucket(stage: Stage) -> int:
    """Elements of what ZeRO reduces at once."""
    return min(REDUCE_BUCKET, stage.parameters) if stage.copies > 1 else 0


def moments(stage: Stage) -> Iterator[Moment]:
    """Those of which one is the heaviest."""
    zero = stage.config.parallel.zero
    all_gradients = FLOAT32 * (stage.partition if zero >= 2 else stage.parameters)
    gathered = FLOAT32 * min(stage.parameters, LIVE_PARAMETERS) if zero == 3 else 0
    yield Moment("optimizer_step", "the optimizer's step", all_gradients, optimizer_step=_optimizer_step(stage))
    bucket = FLOAT32 * _bucket(stage) if zero == 2 else 0
    for moment in _micro_batches(stage, all_gradients, gathered):
        yield moment._replace(communication_buffers=bucket) if moment.kind == "backward" else moment


def _micro_batches(stage: Stage, all_gradients: int, gathered: int) -> Iterator[Moment]:
    """Those of the passes; given the bytes of all gradients and of the weights that ZeRO-3 has gathered."""
    zero, flight = stage.config.parallel.zero, stage.micro_batches_in_flight
    # ZeRO-2 keeps this rank's part of each gradient.
    share = stage.partition / stage.parameters if zero == 2 else 1
    every = _Kept(stage)
    passes = [(flight, zero < 3)]
    if stage.micro_batches > 1:
        passes.append((min(flight, stage.micro_batches - 1), False))
    if stage.teacher is not None:
        gradients = 0 if stage.micro_batches == 1 and zero < 3 else all_gradients
        yield _teaching(stage, stage.teacher)._replace(gradients=gradients, gathered_weights=gathered)
    for in_flight, is_first in passes:
        # Of the micro-batches that wait for their backward pass.
        others, states = (in_flight - 1) * every.kept, (in_flight - 1) * every.states
        if stage.is_last:
            for moment in _head(stage, every):
                gradients = 0 if is_first else all_gradients
                yield moment._replace(gradients=gradients, gathered_weights=gathered)
        is_tied = stage.index == 0 and stage.is_last and stage.config.model.tie_embeddings
        embedding = FLOAT32 * stage.head_parameters
        # A tied head's gradient waits for the embedding's, with which it is added to those of micro-batches before.
        waiting = embedding if is_tied and not is_first else 0
        for moment in _layers(stage, every, is_first):
            yield moment._replace(
                gradients=share * moment.gradients if is_first else all_gradients,
                gathered_weights=gathered,
                activations=moment.activations + others,
                states=moment.states + states,
                working=moment.working + waiting,
            )
        if stage.index == 0:
            # Its gradient has all rows of the vocabulary, and is added to what is there already.
            working = waiting + (embedding if is_tied or not is_first else 0)
            yield Moment(
                "backward", "the embedding's backward pass", all_gradients, gathered, others, 0, states, working
            )


def _teaching(stage: Stage, teacher: TeacherCost) -> Moment:
    """The teacher's forward pass, before the student's."""
    config, tokens = stage.config, stage.tokens
    element = BYTES_PER_ELEMENT[config.train.precision]
    copies = FLOAT32 if element == FLOAT32 else FLOAT32 + element
    logits = tokens * copies * config.model.vocab_size / config.parallel.tensor
    working = teacher.forward_bytes(config, tokens)
    return Moment("teacher", "the teacher's forward pass", 0, logits=logits, working=working)


class _Kept:
    """What a micro-batch keeps between its forward and its backward pass on a stage, in bytes."""

    def __init__(self, stage: Stage):
        self.recomputes = stage.config.train.recompute == "block"
        self.tokens, self.rows = stage.tokens, stage.config.train.micro_batch_size
        self.layers = stage.layer_bytes
        self.joints = self.tokens * sum(layer.kept for layer in self.layers if layer.is_joint)
        self.kept = self.joints + sum(self.of(layer) for layer in self.layers if not layer.is_joint)
        self.states = 0.0 if self.recomputes else sum(self.state(layer) for layer in self.layers)

    def of(self, layer: LayerBytes) -> float:
        """Activations of a layer that is no joint."""
        return self.tokens * (layer.input if self.recomputes else layer.kept)

    def state(self, layer: LayerBytes) -> float:
        return layer.state * (self.rows if layer.whole_rows else 1) + layer.segments * self.rows


def _head(stage: Stage, every: _Kept) -> Iterator[Moment]:
    """The loss, and the head's backward pass after it."""
    config, tokens = stage.config, stage.tokens
    parallel, element = config.parallel, BYTES_PER_ELEMENT[config.train.precision]
    size = config.model.embedding_size
    norm = tokens * size * (FLOAT32 + element) / (parallel.tensor if parallel.sequence else 1)
    kept = every.kept + norm
    if stage.teacher is not None:
        # Outputs of the teacher's layers, the student's as far as its norms do not keep them, and their differences.
        outputs = stage.teacher.outputs(tokens)
        kept += outputs + (0 if element == FLOAT32 else outputs) + outputs * FLOAT32 / element
    if config.train.loss_chunk_size is not None:
        yield from _head_by_chunks(stage, kept, every.states)
        return
    yield Moment("loss", "the loss", 0, 0, kept, tokens * logit_bytes(config), every.states)
    # The gradients of logits and of the weight, in both precisions.
    logits = tokens * element * config.model.vocab_size / parallel.tensor
    working = stage.head_parameters * (FLOAT32 + (element if element != FLOAT32 else 0)) + tokens * size * element
    yield Moment("backward", "the head's backward pass", 0, 0, kept, logits, every.states, working)


def _head_by_chunks(stage: Stage, kept: float, states: float) -> Iterator[Moment]:
    """The same where no more than a chunk of the logits is there at once, and is made again backward."""
    config, tokens = stage.config, stage.tokens
    element = BYTES_PER_ELEMENT[config.train.precision]
    chunk = min(config.train.loss_chunk_size, tokens)
    forward, backward = (chunk * count for count in chunked_logit_bytes(config))
    hidden = tokens * config.model.embedding_size * element
    # The whole sequence is kept, beside this rank's part of it.
    kept += hidden if config.parallel.sequence else 0
    cast = stage.head_parameters * (element if element != FLOAT32 else 0)
    yield Moment("loss", "the loss", 0, 0, kept, forward, states, cast)
    # The weight's gradient in float32, one chunk's part of it where that must be cast, and the hidden states' gradient.
    working = stage.head_parameters * FLOAT32 + 2 * cast + hidden
    yield Moment("backward", "the head's backward pass", 0, 0, kept, backward, states, working)


def _layers(stage: Stage, every: _Kept, is_first: bool) -> Iterator[Moment]:
    """Each mixer's backward pass; gradients are those of what comes behind it, in the first micro-batch."""
    tokens, layers = every.tokens, every.layers
    # Between layers that cost the same everything grows or shrinks evenly, so that the ends are enough.
    ends: dict[int, list[int]] = {}
    for place, layer in enumerate(layers):
        ends.setdefault(layer.identity, []).append(place)
    looked_at = {place for places in ends.values() for place in ((places[0], places[-1]) if is_first else places[-1:])}
    before, states = 0.0, 0.0
    behind = sum(layer.parameters for layer in layers)
    # Where the embedding is tied to the head its gradient begins there too.
    behind += stage.head_parameters + stage.config.model.embedding_size if stage.is_last else 0
    joints_left = every.joints
    shared = _shared_behind(layers)
    for place, layer in enumerate(layers):
        own_state = every.state(layer)
        states += own_state
        behind -= layer.parameters
        if layer.is_joint:
            joints_left -= tokens * layer.kept
        if place in looked_at:
            there = before + (joints_left if layer.is_inner else 0)
            there += tokens * layer.input if every.recomputes and not layer.is_joint else 0
            gradients, found = behind, shared[place]
            # Gradients of shared weights are added to those of micro-batches before once all layers have found theirs.
            waits = any(mixer.shared for earlier in layers[: place + 1] for mixer in earlier.mixers)
            for mixer in reversed(layer.mixers):
                weights, copies = mixer.product, 0.0
                if every.recomputes and not layer.is_joint:
                    weights, copies = mixer.gradient, mixer.cast
                working = tokens * layer.residual + copies + max(tokens * mixer.working, weights)
                name = f"the backward pass of {layer.name}, {mixer.name}"
                held = states if not every.recomputes else own_state
                activations = there + tokens * mixer.kept
                if is_first or waits:
                    working += FLOAT32 * sum(found.values())
                yield Moment("backward", name, FLOAT32 * gradients, 0, activations, 0, held, working)
                gradients += mixer.parameters
                found = found | mixer.shared
        before += tokens * layer.kept if layer.is_joint else every.of(layer)


def _shared_behind(layers: Sequence[LayerBytes]) -> list[dict[tuple[str, str], int]]:
    """Of each layer, the shared parameters that layers behind it use."""
    behind: list[dict[tuple[str, str], int]] = [{}]
    for layer in reversed(layers[1:]):
        used = {name: count for mixer in layer.mixers for name, count in mixer.shared.items()}
        behind.append(behind[-1] | used if used else behind[-1])
    return behind[::-1]


def _optimizer_step(stage: Stage) -> int:
    """AdamW's square roots beside what brings gradients into place for it."""
    zero, partition = stage.config.parallel.zero, stage.partition
    if zero == 0:
        return FLOAT32 * stage.parameters
    if zero == 3:
        return FLOAT32 * min(partition, LIVE_PARAMETERS)
    return FLOAT32 * max(2 * partition, _bucket(stage) if zero == 1 else 0)


def heaviest(stages: Iterable[Stage]) -> int:
    """The most that any of the stages' ranks holds, in bytes."""
    return max(peak_bytes(stage) for stage in stages)
