"""What the checks share: mixers with random parameters, random inputs, gradients by name, comparisons.

Differences are measured against the largest value of the tensor expected.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pretrain.models.carried import initial_carried
from pretrain.models.mixer import Carried, ChannelMixer, LayerContext, SequenceMixer, State
from pretrain.models.mixer_config import MixerConfig
from pretrain.models.parameters import declared_parameters, full_shape, initialise_weights, shard_of
from pretrain.models.registry import MixerFamily
from pretrain.parallel.topology import build_topology, megatron_config
from tests.configurations import tiny_config
from tests.conformance.cases import Case

# float32: sums of some dozens of terms in another order. Gradients pass through more of them.
OUTPUT_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-4

NUM_LAYERS = 3


def generator_of(case: Case, purpose: str = "") -> torch.Generator:
    """Random numbers that depend on the case and the purpose alone."""
    return torch.Generator().manual_seed(zlib.crc32(f"{case.name}/{purpose}".encode()))


def context_of(hidden_size: int, tensor: int = 1, sequence: bool = False) -> LayerContext:
    """Builds the groups of this layout, in this process or on every rank of a pool, and a layer's place in it."""
    # Of the model in this configuration, only the parallel sizes reach a mixer.
    config = tiny_config(parallel={"tensor": tensor, "sequence": sequence, "zero": 0})
    build_topology(config)
    return LayerContext(hidden_size, layer=1, num_layers=NUM_LAYERS, megatron=megatron_config(config))


def alone(family: MixerFamily, config: MixerConfig, context: LayerContext) -> SequenceMixer | ChannelMixer:
    """A mixer without a model: it owns what the layers of a model share."""
    mixer = family.module(config, context)
    mixer.shared = nn.ModuleDict(mixer.shared_modules(config, context))
    return mixer


def build(case: Case, tensor: int = 1, sequence: bool = False) -> SequenceMixer | ChannelMixer:
    """The case's mixer, every parameter moved away from its first value, the same in every layout."""
    context = context_of(case.hidden_size, tensor, sequence)
    mixer = alone(case.family, case.config, context)
    initialise_weights(mixer, seed=1)
    with torch.no_grad():
        for name, parameter in declared_parameters(mixer):
            shape = full_shape(parameter)
            noise = torch.randn(shape, generator=generator_of(case, name))
            scale = 0.3 if len(shape) == 1 else 0.7 / math.sqrt(math.prod(shape[1:]))
            parameter.add_(shard_of(scale * noise, parameter.spec))
    return mixer


def random_hidden(case: Case, length: int, batch: int, purpose: str = "hidden") -> Tensor:
    """``(sequence, batch, hidden_size)``."""
    return torch.randn(length, batch, case.hidden_size, generator=generator_of(case, purpose))


def random_length(case: Case) -> int:
    return int(torch.randint(17, 30, (), generator=generator_of(case, "length")))


def observable(case: Case, mixer: SequenceMixer, state: State, rows: slice = slice(None)) -> dict[str, Tensor]:
    """What two states that mean the same must agree on, the gradient's path through them included.

    Tensors that do not grow are compared as they are. A tensor that grows may keep more or less of what nothing reads
    any more, so it is known by what is read from it: the outputs of tokens that follow.

    Args:
        case: the mixer's.
        mixer: that left the state.
        state: of some sequences.
        rows: which of three sequences those are; each is followed by tokens of its own.
    """
    growing = {name for name, tensor in mixer.state_tensors().items() if None in tensor.shape}
    found = {name: tensor for name, tensor in state.items() if name not in growing}
    if growing:
        batch = next(iter(state.values())).shape[0]
        following = random_hidden(case, 4, 3, "following")[:, rows][:, :batch]
        found["outputs that follow"], _ = mixer(following, state, None)
    return found


def weighted_sum(case: Case, tensors: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient reaches every element of every tensor with another weight."""
    terms = [
        (tensor * torch.randn(tensor.shape, generator=generator_of(case, f"weight of {name}"))).sum()
        for name, tensor in tensors.items()
    ]
    return torch.stack(terms).sum()


def gradients(scalar: Tensor, mixer: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the inputs and of every parameter, by name; zero where there is no path."""
    wanted = dict(inputs) | dict(mixer.named_parameters())
    found = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """The largest difference is small beside the largest value expected."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    scale = float(expected.detach().abs().max())
    error = float((actual.detach().float() - expected.detach().float()).abs().max())
    assert error <= tolerance * scale, f"{what}: differs by {error:.2g} where the largest value is {scale:.2g}"


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    assert actual.keys() == expected.keys(), f"{what}: {sorted(actual)}, not {sorted(expected)}"
    for name, tensor in actual.items():
        assert_close(tensor, expected[name], tolerance, f"{what}, {name}")


def assert_every_parameter_matters(mixer: nn.Module, found: Mapping[str, Tensor]) -> None:
    for name, _ in mixer.named_parameters():
        assert found[name].abs().max() > 0, f"the gradient of {name} is zero: the check would prove nothing of it"


def carried_of(case: Case, length: int, batch: int) -> Carried:
    """What another layer has handed on of what the mixer carries; nothing for one that carries nothing."""
    channels = case.config.carried(case.hidden_size)
    return {name: tensor for name, tensor in random_carried(case, length, batch).items() if name in channels}


def random_carried(case: Case, length: int, batch: int) -> Carried:
    """What another layer has handed on, of every name that the mixer carries, and of one that it does not know."""
    channels = {**case.config.carried(case.hidden_size), "of another mixer": 2}
    return {
        name: torch.randn(length, batch, size, generator=generator_of(case, f"carried {name}"))
        for name, size in channels.items()
    }


def call(mixer: nn.Module, hidden: Tensor, carried: Carried | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """A sequence mixer from the beginning and its state, or a channel mixer and what it hands on."""
    if isinstance(mixer, SequenceMixer):
        return mixer(hidden, None, None)
    if not mixer.config.carried(hidden.shape[-1]):
        return mixer(hidden), {}
    if carried is None:
        carried = initial_carried(hidden, mixer.config.carried(hidden.shape[-1]))
    return mixer(hidden, carried)
