"""What one layer holds on a rank in its backward pass, whatever the batch, recomputation and ZeRO. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config.schema import Config
from pretrain.plan.costs import BYTES_PER_ELEMENT, FLOAT32
from pretrain.plan.layers import BlockCost


@dataclass(frozen=True)
class MixerBytes:
    """A mixer, or a joint of a hierarchy, while its backward pass runs.

    Attributes:
        name: its type.
        kept: of the layer's activations per token read those that are still there: its own and those before it.
        working: per token beyond that.
        gradient: of the weights of its largest product, in both precisions.
        product: the same, and the weights' copy where that is there at the same time.
        cast: copies of weights, its own and those before it, that recomputation keeps for the backward pass.
        parameters: on this rank, with the norm before it.
        shared: parameters that it shares with other layers, by network and module.
    """

    name: str
    kept: float
    working: float
    gradient: float
    product: float
    cast: float
    parameters: int
    shared: dict[tuple[str, str], int]


@dataclass(frozen=True)
class LayerBytes:
    """A layer on one rank; bytes are per token read unless it is said otherwise.

    Attributes:
        name: of its place in the model.
        identity: the same for layers that differ in their place alone.
        kept: activations of all its mixers for the backward pass.
        input: hidden states that it reads, and what is carried beside them.
        residual: gradient of the hidden states behind it.
        mixers: in the order of the forward pass.
        state: of one row before the first token, whatever its length, and kept if nothing is recomputed.
        segments: of one row, what other ranks said of the segments before.
        is_joint: joins two networks of a hierarchy; not recomputed, and there as long as what it joins.
        is_inner: a joint is round it.
        whole_rows: it has a state for each row, not one for all rows of a micro-batch.
    """

    name: str
    identity: int
    kept: float
    input: float
    residual: float
    mixers: tuple[MixerBytes, ...]
    state: float
    segments: float
    is_joint: bool
    is_inner: bool
    whole_rows: bool

    @property
    def parameters(self) -> int:
        return sum(mixer.parameters for mixer in self.mixers)


def layer_bytes(config: Config, layers: Sequence[BlockCost], first_layer: int) -> list[LayerBytes]:
    """Each layer of a pipeline stage, in the order of the forward pass.

    Args:
        layers: of the stage; those of a hierarchy's outer stages stand behind those of ``model.layers``.
        first_layer: index of the first in the model.
    """
    found: dict[int, LayerBytes] = {}
    described = []
    for index, layer in enumerate(layers, start=first_layer):
        known = found.get(id(layer))
        if known is None:
            known = found[id(layer)] = _describe(config, layer)
        name = f"layer {index}" if layer.place == "layers" and not layer.is_joint else known.name
        described.append((_position(layer), LayerBytes(**vars(known) | {"name": name})))
    # Stable: layers of one network stay in their order.
    return [layer for _, layer in sorted(described, key=lambda pair: pair[0])]


def _position(layer: BlockCost) -> tuple[int, int]:
    """Encoders from the outside in, then the innermost network, joints, and decoders from the inside out."""
    if layer.is_joint:
        return 1, 0
    if layer.place == "layers":
        return 0, 0
    depth = next((int(part) for part in layer.place.split(".") if part.isdigit()), 0)
    return (-1, depth) if layer.place.endswith("encoder") else (2, -depth)


def _describe(config: Config, layer: BlockCost) -> LayerBytes:
    parallel, element = config.parallel, BYTES_PER_ELEMENT[config.train.precision]
    tensor = parallel.tensor
    split = tensor if parallel.sequence else 1
    is_cast = element != FLOAT32
    mixers, kept, cast = [], 0.0, 0.0
    norm = layer.norms * layer.hidden_size // len(layer.mixers)
    for name, size, mixer in zip(layer.names, layer.activation_bytes_by_mixer(config), layer.mixers, strict=True):
        kept += size
        parameters = mixer.parameters_per_rank(tensor, parallel.expert)
        at_once = mixer.at_once_per_rank(tensor, parallel.expert)
        # In float32 weights are not cast, but those of several maps are joined for one product.
        cast += element * (parameters if is_cast else at_once)
        gradient = FLOAT32 * at_once + (element * at_once if is_cast else 0)
        product = gradient + (0 if is_cast else FLOAT32 * at_once)
        working = layer.positions_per_token * mixer.working_bytes_per_rank(1 if layer.is_joint else tensor)
        shared = layer.shared_by(mixer)
        mixers.append(MixerBytes(name, kept, working, gradient, product, cast, parameters + norm, shared))
    return LayerBytes(
        name=layer.place,
        identity=id(layer),
        kept=kept,
        input=layer.input_bytes(element) / split,
        residual=layer.input_bytes(element) / split,
        mixers=tuple(mixers),
        state=max(layer.initial_state_bytes, layer.carried_state_bytes) / tensor,
        segments=layer.kept_of_segments / tensor,
        is_joint=layer.is_joint,
        is_inner=layer.place == "layers" and not layer.is_joint,
        whole_rows=layer.positions_per_token == 1,
    )
