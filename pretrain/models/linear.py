"""Megatron-core's parallel linear layers with float32 weights, products in the dtype of the activations.

Parameters stay float32, so that they are their own master copies and their gradients accumulate in float32;
each product casts its weight to the dtype of its input. The cast copy is not kept for the backward pass: it is
made again there, so that it costs no memory between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from pretrain.models.parameters import ParameterSpec, declare, new_parameter

# What is made of hidden states and a weight, in place of their product, while the module that owns the weight is
# called: where weights are split over ranks (ZeRO 3), they are whole only then.
UsesWeight = Callable[[Tensor, Tensor], Tensor]


def no_initialisation(tensor: Tensor) -> Tensor:
    """Megatron-core asks for an initialiser; the configuration tells it not to initialise."""
    return tensor


def multiply_by_built(
    linear: Callable[..., Tensor], build_weight: Callable[[], Tensor], megatron: TransformerConfig
) -> Tensor:
    """Runs ``linear(weight)`` so that the weight is built again, not stored, for the backward pass.

    Under recomputation nothing is stored anyway, and hooks of our own would hide what the product keeps from
    ``torch.utils.checkpoint``, which sees only the innermost hooks.
    """
    weight = build_weight()
    if megatron.recompute_granularity is not None:
        return linear(weight)
    # Not the weight itself: the hook lives as long as the graph and would keep it alive.
    pointer, shape = weight.data_ptr(), weight.shape

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == pointer and saved.shape == shape else saved

    def unpack(saved: Tensor | None) -> Tensor:
        if saved is not None:
            return saved
        with torch.no_grad():
            return build_weight()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return linear(weight)


class _CastColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel product whose weight is built from float32 parameters by the caller."""

    def forward_with(self, hidden: Tensor, build_weight: Callable[[], Tensor]) -> Tensor:
        return multiply_by_built(lambda weight: self(hidden, weight=weight)[0], build_weight, self.config)


class _CastsWeight:
    """Before one of Megatron-core's linear layers: its own weight is cast to the dtype of the input."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: object) -> Tensor:  # noqa: A002
        product = super()._forward_impl
        if weight.dtype == input.dtype:
            return product(input=input, weight=weight, **options)
        return multiply_by_built(
            lambda cast: product(input=input, weight=cast, **options), lambda: weight.to(input.dtype), self.config
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden)[0]


class RowParallelProjection(_CastsWeight, RowParallelLinear):
    """``hidden @ weight.T``, the input split by channels; the result is summed over tensor-parallel ranks.

    Under sequence parallelism each rank keeps its part of the sequence of that sum.
    """

    def __init__(self, input_size: int, output_size: int, spec: ParameterSpec, megatron: TransformerConfig):
        super().__init__(
            input_size,
            output_size,
            config=megatron,
            init_method=no_initialisation,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        declare(self.weight, spec)


@dataclass(frozen=True)
class Projection:
    """One of several linear maps of the same input.

    Attributes:
        size: output channels, all tensor-parallel ranks together.
        weight: its declaration. ``shard_dimension`` 0 splits the channels evenly over the ranks. None, with
            ``partial_gradient=True``, has every rank compute all of them for its own use (keys shared by the
            heads of several ranks): each then knows a part of the gradient.
    """

    size: int
    weight: ParameterSpec


class ColumnParallelProjections(nn.Module):
    """Several linear maps of one input, done as a single product, each split over ranks by its own outputs.

    A map that every rank computes whole takes part too: the ranks' gradients of the input are summed anyway.

    Fusing at run time rather than in the parameters keeps each map under its own global name, so that any
    number of ranks holds whole slices of each; and under sequence parallelism the input is gathered once.

    Parameters are named ``{name}_weight``. Biases are the caller's, who may want them added in float32.
    """

    def __init__(self, input_size: int, projections: dict[str, Projection], megatron: TransformerConfig):
        super().__init__()
        self.names = tuple(projections)
        for name, projection in projections.items():
            if projection.weight.shard_dimension is None and not projection.weight.partial_gradient:
                raise ValueError(f"the projection {name} is whole on every rank, so it must say partial_gradient=True")
            weight = new_parameter((projection.size, input_size), projection.weight)
            self.register_parameter(f"{name}_weight", weight)
        self.sizes = {name: getattr(self, f"{name}_weight").shape[0] for name in self.names}
        self.ranks = parallel_state.get_tensor_model_parallel_world_size()
        self._new_linear = partial(
            _CastColumnParallelLinear,
            input_size,
            config=megatron,
            init_method=no_initialisation,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=True,
        )
        # One for each set of maps that is done as one product; they hold no weights.
        self.linears: dict[tuple[str, ...], _CastColumnParallelLinear] = {}

    def forward(self, hidden: Tensor, joined: tuple[str, ...] = ()) -> tuple[Tensor, ...]:
        """Maps ``(sequence, batch, input_size)`` to one tensor of this rank's channels per projection.

        ``joined`` names projections that follow one another and are returned as a single tensor, in the first one's
        place: they are one in memory anyway.
        """
        return tuple(self._product(hidden, self.names, joined).values())

    def in_turn(
        self, hidden: Tensor, later: tuple[str, ...], apart: bool, joined: tuple[str, ...] = ()
    ) -> tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor, ...]]]:
        """As :meth:`forward`, and the maps named in ``later`` are returned by a function, to be called once.

        Args:
            apart: it may do them as a product of their own when it is called, while messages are on their way. Over
                tensor-parallel ranks all stay one product, whose messages would be twice as many.
            joined: none of which is in ``later``.
        """
        now = tuple(name for name in self.names if name not in later)
        if apart and self.ranks == 1:
            first = self._product(hidden, now, joined)
            return tuple(first.values()), lambda: tuple(self._product(hidden, later).values())
        found = self._product(hidden, self.names, joined)
        behind = tuple(found.pop(name) for name in later)
        return tuple(found.values()), lambda: behind

    def _product(self, hidden: Tensor, names: tuple[str, ...], joined: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Some of the maps as one product, by name; those that are joined by the first one's."""
        weights = [getattr(self, f"{name}_weight") for name in names]

        def build() -> Tensor:
            return torch.cat([weight.to(hidden.dtype) for weight in weights])

        sizes = {name: self.sizes[name] for name in names if name not in joined[1:]}
        if joined:
            sizes[joined[0]] = sum(self.sizes[name] for name in joined)
        if names not in self.linears:
            # Megatron-core divides by the number of ranks what it is told.
            self.linears[names] = self._new_linear(sum(sizes.values()) * self.ranks)
        product = self.linears[names].forward_with(hidden, build)
        return dict(zip(sizes, product.split(list(sizes.values()), dim=-1), strict=True))


class ColumnParallelProjection(_CastsWeight, ColumnParallelLinear):
    """A single column-parallel map with its own ``weight``, for the output head."""

    def __init__(self, input_size: int, output_size: int, spec: ParameterSpec, megatron: TransformerConfig):
        super().__init__(
            input_size, output_size, config=megatron, init_method=no_initialisation, bias=False, gather_output=False
        )
        declare(self.weight, spec)

    def forward(self, hidden: Tensor, instead: UsesWeight | None = None) -> Tensor:
        """``(sequence, batch, output_size / ranks)``; or what ``instead`` makes of the input and the weight."""
        return super().forward(hidden) if instead is None else instead(hidden, self.weight)


class TiedProjection(nn.Module):
    """A column-parallel map by a weight that belongs to another module: the output head of tied embeddings."""

    def __init__(self, input_size: int, output_size: int, megatron: TransformerConfig):
        super().__init__()
        self.linear = _CastColumnParallelLinear(
            input_size,
            output_size,
            config=megatron,
            init_method=no_initialisation,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=True,
        )

    def forward(self, hidden: Tensor, weight: Tensor, instead: UsesWeight | None = None) -> Tensor:
        """``(sequence, batch, output_size / ranks)`` for this rank's ``weight``; or what ``instead`` makes of both."""
        if instead is not None:
            return instead(hidden, weight)
        return self.linear.forward_with(hidden, lambda: weight.to(hidden.dtype))
