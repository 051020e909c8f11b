"""What a parameter declares about itself: its start, its split over ranks, its decay.

Weights start from a seed by their *global* name: every rank draws the whole tensor from a generator seeded by
(seed, name) and keeps its slice. Every layout of ranks so starts from the same model, which is what lets a
parallel run be compared with a single process, value by value.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Generator, Tensor, nn

Initialiser = Callable[[Tensor, Generator], None]


@dataclass(frozen=True)
class ParameterSpec:
    """Declared by the module that owns a parameter.

    Attributes:
        initialise: fills the full (unsplit) float32 tensor in place, drawing from the generator.
        shard_dimension: dimension split evenly over tensor-parallel ranks; None is replicated.
        split_size: size of that dimension in the whole tensor, where it need not divide by the number of ranks: the
            last ranks' slices then end in padding, zeros that no checkpoint holds. None: it divides.
        weight_decay: whether decoupled weight decay applies.
        partial_gradient: the parameter is replicated, but each tensor-parallel rank sees only a part of its
            gradient (a part of the sequence, or of the heads), so gradients are summed over those ranks.
        bound: the optimizer keeps every element within [-bound, bound] after each step; None leaves it free.
        pipeline_copy: another pipeline stage holds this very parameter (a tied embedding): gradients of the
            copies are summed, and norms and checkpoints count the parameter there.
        learning_rate_factor: the parameter's learning rate over that of the run.
        on_every_stage: all pipeline stages hold this very parameter, and gradients are summed over them.
        expert: the parameter belongs to one routed expert: under expert parallelism one rank of each expert-parallel
            group holds it, and its gradient is reduced over the ranks that do.
    """

    initialise: Initialiser
    shard_dimension: int | None = None
    split_size: int | None = None
    weight_decay: bool = True
    partial_gradient: bool = False
    bound: float | None = None
    pipeline_copy: bool = False
    learning_rate_factor: float = 1.0
    on_every_stage: bool = False
    expert: bool = False


def normal(standard_deviation: float) -> Initialiser:
    """Starts from N(0, standard_deviation^2)."""

    def fill(tensor: Tensor, generator: Generator) -> None:
        tensor.normal_(0.0, standard_deviation, generator=generator)

    return fill


def uniform(low: float, high: float) -> Initialiser:
    """Starts from U(low, high)."""

    def fill(tensor: Tensor, generator: Generator) -> None:
        tensor.uniform_(low, high, generator=generator)

    return fill


def small_normal(width: int) -> Initialiser:
    """N(0, 2 / (5 width)): "small" initialisation (Nguyen and Salazar 2019, arXiv 1910.05895)."""
    return normal(math.sqrt(2.0 / (5.0 * width)))


def wang_normal(width: int, num_layers: int) -> Initialiser:
    """N(0, (2 / (num_layers sqrt(width)))^2): for projections back into the residual stream."""
    return normal(2.0 / (num_layers * math.sqrt(width)))


def constant(value: float) -> Initialiser:
    """Starts from one value everywhere."""

    def fill(tensor: Tensor, generator: Generator) -> None:
        tensor.fill_(value)

    return fill


def identity(tensor: Tensor, generator: Generator) -> None:
    """Starts a square matrix from the identity."""
    nn.init.eye_(tensor)


def evenly_spaced(first: float, last: float) -> Initialiser:
    """Starts from evenly spaced values along the tensor's only dimension."""

    def fill(tensor: Tensor, generator: Generator) -> None:
        tensor.copy_(torch.linspace(first, last, tensor.numel()))

    return fill


def declare(parameter: nn.Parameter, spec: ParameterSpec) -> nn.Parameter:
    """Attaches the declaration, and the marks by which Megatron-core and DeepSpeed know a split parameter."""
    parameter.spec = spec
    if spec.shard_dimension is not None:
        for name, value in (
            ("tensor_model_parallel", True),
            ("partition_dim", spec.shard_dimension),
            ("partition_stride", 1),
        ):
            setattr(parameter, name, value)
    if spec.pipeline_copy:
        # DeepSpeed's mark: left out of the gradient norm.
        parameter.ds_pipe_replicated = True
    return parameter


def scale_learning_rate(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Declares that these parameters learn at ``factor`` times the rate of the run."""
    for parameter in parameters:
        parameter.spec = dataclasses.replace(parameter.spec, learning_rate_factor=factor)


def new_parameter(full_shape: tuple[int, ...], spec: ParameterSpec) -> nn.Parameter:
    """A float32 parameter of this rank's slice of ``full_shape``, not yet filled."""
    shape = list(full_shape)
    if spec.shard_dimension is not None:
        size = parallel_state.get_tensor_model_parallel_world_size()
        if shape[spec.shard_dimension] % size:
            raise ValueError(f"shape {full_shape} does not split over {size} ranks at {spec.shard_dimension}")
        shape[spec.shard_dimension] //= size
    return declare(nn.Parameter(torch.empty(shape, dtype=torch.float32)), spec)


def padded_size(size: int) -> int:
    """The least multiple of the number of tensor-parallel ranks that is not below ``size``."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return -(-size // ranks) * ranks


def full_shape(parameter: nn.Parameter, shape: torch.Size | None = None) -> tuple[int, ...]:
    """Shape of the whole tensor that this rank holds a slice of."""
    spec, sizes = parameter.spec, list(parameter.shape if shape is None else shape)
    if spec.shard_dimension is not None:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        sizes[spec.shard_dimension] = spec.split_size or sizes[spec.shard_dimension] * ranks
    return tuple(sizes)


def own_slice(spec: ParameterSpec, shape: torch.Size) -> tuple[int, int]:
    """First place, along the split dimension of the whole tensor, that this rank holds, and how many.

    ``shape`` is that of this rank's tensor, which may be longer by padding.
    """
    length = shape[spec.shard_dimension]
    offset = length * parallel_state.get_tensor_model_parallel_rank()
    if spec.split_size is None:
        return offset, length
    return min(offset, spec.split_size), max(min(length, spec.split_size - offset), 0)


def padded_to(part: Tensor, spec: ParameterSpec, shape: torch.Size) -> Tensor:
    """This rank's slice of a tensor, filled up with zeros to ``shape``."""
    if part.shape == shape:
        return part
    whole = part.new_zeros(shape)
    whole.narrow(spec.shard_dimension, 0, part.shape[spec.shard_dimension]).copy_(part)
    return whole


def shard_of(full: Tensor, spec: ParameterSpec) -> Tensor:
    """This rank's slice of a whole tensor."""
    if spec.shard_dimension is None:
        return full
    shape = list(full.shape)
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    shape[spec.shard_dimension] = -(-shape[spec.shard_dimension] // ranks)
    offset, length = own_slice(spec, torch.Size(shape))
    return padded_to(full.narrow(spec.shard_dimension, offset, length), spec, torch.Size(shape))


def declared_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its global name, in the model's order.

    Raises:
        TypeError: a module made a parameter without declaring it.
    """
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "spec"):
            raise TypeError(f"parameter {name} has no ParameterSpec; its module must declare one")
        yield name, parameter


@torch.no_grad()
def initialise_weights(model: nn.Module, seed: int) -> None:
    """Fills every parameter from ``seed`` and its global name; the same in every layout."""
    for name, parameter in declared_parameters(model):
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        full = torch.empty(full_shape(parameter), dtype=torch.float32)
        parameter.spec.initialise(full, generator)
        parameter.copy_(shard_of(full, parameter.spec))
