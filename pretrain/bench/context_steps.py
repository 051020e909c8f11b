"""What each rank does in ``bench context``: one forward and backward of its segment, checked and then timed.

The functions that take a place are called on all ranks of a group together.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernels.segments import ProcessSegments, Traffic
from pretrain.bench.cells import Draw
from pretrain.bench.contestants import Workload, randomise
from pretrain.bench.context_layers import LAYERS, HeadExchange, Layer, Sizes
from pretrain.bench.context_processes import Place
from pretrain.config import Config, parse_config
from pretrain.models.decoder import Decoder
from pretrain.models.mixer import LayerContext, SequenceMixer
from pretrain.models.parameters import initialise_weights
from pretrain.models.registry import sequence_mixers
from pretrain.models.segments import SegmentChain
from pretrain.parallel.build import build_model
from pretrain.parallel.topology import build_topology, megatron_config

ALONE = "one process"
CHAIN = "chain"
ALL_TO_ALL = "all-to-all"


@dataclass(frozen=True)
class Outcome:
    """What a step computed.

    Attributes:
        parts: of this rank's segment, the sequence first.
        sums: to be added up over ranks.
    """

    parts: dict[str, Tensor]
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One forward and backward, and what this rank has received in it."""

    run: Callable[[], Outcome]
    traffic: Traffic


def layout(workload: Workload, place: Place, scheme: str = CHAIN) -> Config:
    """The run of one step whose sequences the ranks of a place share."""
    raw = workload.config().model_dump(mode="json")
    raw["parallel"] |= {"context": place.size, "context_scheme": scheme}
    raw["train"]["device"] = place.device
    return parse_config(raw, "bench context")


def hold_layer(place: Place, name: str, sizes: Sizes, tokens: int) -> list[str]:
    """Holds a layer's steps by every scheme that there is for it here; returns the schemes.

    Args:
        name: of :data:`LAYERS`.
        tokens: of the whole sequence.
    """
    _forget(place)
    config = layout(Workload(1, tokens, sizes.hidden_size, 1, 1), place)
    build_topology(config)
    kind = LAYERS[name]
    layer = kind.build(sizes, LayerContext(sizes.hidden_size, 0, 1, megatron_config(config)))
    initialise_weights(layer, seed=0)
    randomise(layer)
    layer.to(place.device)
    group = parallel_state.get_context_parallel_group()
    inputs = Draw(seed=1)(tokens, 1, layer.channels)
    inputs = inputs.chunk(place.size)[place.rank].to(place.device)
    if place.size == 1:
        place.held[ALONE] = layer_step(layer, inputs, None, place)
        return [ALONE]
    for scheme in kind.schemes:
        place.held[scheme] = layer_step(layer, inputs, ProcessSegments(group, scheme), place)
    place.held[CHAIN] = layer_step(layer, inputs, SegmentChain(), place)
    if sizes.whole_heads(place.size):
        place.held[ALL_TO_ALL] = layer_step(layer, inputs, HeadExchange(group), place)
    return list(place.held)


def layer_step(
    mixer: SequenceMixer,
    inputs: Tensor,
    before: ProcessSegments | SegmentChain | HeadExchange | None,
    place: Place,
) -> Step:
    """A mixer's step.

    Args:
        inputs: ``(sequence / ranks, batch, channels)``, this rank's segment.
        before: how it comes to know of earlier segments; None: there are none.
    """
    inputs = inputs.detach().requires_grad_()
    parameters = dict(mixer.named_parameters())
    cotangent: list[Tensor] = []

    def output() -> Tensor:
        if isinstance(before, HeadExchange):
            assert isinstance(mixer, Layer)
            return mixer.by_heads(inputs, before)
        if not isinstance(before, SegmentChain):
            return mixer(inputs, before, None)[0]
        mixed, state = mixer(inputs, before.receive_state(mixer, inputs), None)
        return before.send_state(mixer, mixed, state)

    def run() -> Outcome:
        mixed = output()
        if not cotangent:
            # The same whole one however many ranks there are.
            whole = Draw(seed=2)(place.size * len(mixed), *mixed.shape[1:])
            cotangent.append(whole.chunk(place.size)[place.rank].to(mixed.device))
        gradients = torch.autograd.grad(mixed, [inputs, *parameters.values()], cotangent)
        if isinstance(before, SegmentChain):
            before.finish()
        named = {f"gradient of {name}": part for name, part in zip(parameters, gradients[1:], strict=True)}
        return Outcome({"output": mixed.detach(), "gradient of the input": gradients[0]}, named)

    return Step(run, Traffic() if before is None else before.traffic)


def hold_model(place: Place, workload: Workload) -> list[str]:
    """Holds a whole model's steps, its layers asking for what is before them or waiting for it; returns the schemes."""
    _forget(place)
    if place.size == 1:
        place.held[ALONE] = model_step(workload, place, CHAIN)
        return [ALONE]
    for scheme in ("gather", CHAIN):
        place.held[scheme] = model_step(workload, place, scheme)
    return list(place.held)


def model_step(workload: Workload, place: Place, scheme: str) -> Step:
    """Loss of this rank's labels, and gradients."""
    config = layout(workload, place, scheme)
    build_topology(config)
    model: Decoder = build_model(config)
    initialise_weights(model, seed=0)
    randomise(model)
    model.to(place.device)
    batch = workload.batch()
    # One document, of which every segment knows what is before it.
    batch.document_starts[:, 1:] = False
    batch = batch.segment(place.rank, place.size).to(place.device)
    waits = model.chain is not None and model.segments is None

    def run() -> Outcome:
        loss = model(*model.inputs(batch))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        if waits:
            model.chain.finish()
        names = [f"gradient of {name}" for name, _ in model.named_parameters()]
        return Outcome({}, {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))})

    if place.size == 1:
        return Step(run, Traffic())
    return Step(run, model.chain.traffic if waits else model.segments.traffic)


def _forget(place: Place) -> None:
    place.held.clear()
    gc.collect()


def save_reference(place: Place, path: str) -> None:
    """One process's outcome, in a file that others compare theirs with."""
    outcome = place.held[ALONE].run()
    tensors = outcome.parts | outcome.sums
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def compare(place: Place, name: str, path: str) -> dict[str, float]:
    """Of each tensor of this rank's outcome, the largest difference over the largest value of one process's."""
    outcome = place.held[name].run()
    differences = {}
    with safe_open(path, "pt") as saved:
        names = set(saved.keys())
        if names != {*outcome.parts, *outcome.sums}:
            raise ValueError(f"{name} has {sorted({*outcome.parts, *outcome.sums})}, one process {sorted(names)}")
        for key, part in outcome.parts.items():
            expected = saved.get_tensor(key)
            scale = expected.abs().max()
            expected = expected.chunk(place.size)[place.rank]
            differences[key] = float((part.cpu() - expected).abs().max() / scale)
        for key, part in outcome.sums.items():
            total, expected = part.clone(), saved.get_tensor(key)
            dist.all_reduce(total)
            differences[key] = float((total.cpu() - expected).abs().max() / expected.abs().max())
    return differences


def received(place: Place, name: str) -> dict[str, tuple[int, int]]:
    """Messages and bytes that this rank receives in one step, by kind of call."""
    step = place.held[name]
    step.traffic.clear()
    step.run()
    return {kind: (count, step.traffic.bytes[kind]) for kind, count in step.traffic.messages.items()}


def hold_mixer(place: Place, mixer: str, options: dict, hidden_size: int, each: int, schemes: Sequence[str]) -> None:
    """Holds the steps of a registered mixer, ``each`` tokens a rank, by schemes to count the messages of."""
    _forget(place)
    family = sequence_mixers()[mixer]
    config = family.config.model_validate(options)
    run = layout(Workload(1, place.size * each, hidden_size, 1, 1), place)
    build_topology(run)
    built = family.module(config, LayerContext(hidden_size, 0, 1, megatron_config(run)))
    initialise_weights(built, seed=0)
    randomise(built)
    built.to(place.device)
    group = parallel_state.get_context_parallel_group()
    inputs = Draw(seed=1)(each, 1, hidden_size).to(place.device)
    for scheme in schemes:
        before = SegmentChain() if scheme == CHAIN else ProcessSegments(group, scheme)
        place.held[scheme] = layer_step(built, inputs, before, place)
