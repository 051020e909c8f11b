"""Programs that run on every rank of a pool of workers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.models.norm import GroupedRMSNorm
from pretrain.models.parameters import padded_size, shard_of
from pretrain.models.vocabulary import Vocabulary, chunked_cross_entropy
from pretrain.parallel.topology import build_topology
from tests.configurations import tiny_config


def grouped_norm(
    tensor: int, size: int, groups: int, hidden: Tensor, weight: Tensor, cotangent: Tensor
) -> list[Tensor]:
    """This rank's slices of the result, and of the gradients of input and weight."""
    build_topology(tiny_config(parallel={"tensor": tensor, "zero": 0}))
    norm = GroupedRMSNorm(size, groups, epsilon=1e-5)

    def local(full: Tensor) -> Tensor:
        # Channels come first for the declaration of a weight.
        return shard_of(full.movedim(-1, 0), norm.weight.spec).movedim(0, -1).contiguous()

    with torch.no_grad():
        norm.weight.copy_(local(weight))
    inputs = local(hidden).requires_grad_()
    output = norm(inputs)
    gradients = torch.autograd.grad(output, [inputs, norm.weight], local(cotangent))
    return [output.detach(), *gradients]


def chunked_loss(
    tensor: int,
    sequence: bool,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cotangent: Tensor,
    chunk_size: int,
    cap: float | None,
) -> list[Tensor]:
    """Nats, this rank's part of the input's gradient, and its rows of the weight's."""
    build_topology(tiny_config(parallel={"tensor": tensor, "sequence": sequence, "zero": 0}))
    rows = padded_size(len(weight)) // tensor
    vocabulary = Vocabulary.of_this_rank(len(weight), rows, cap)
    rank = parallel_state.get_tensor_model_parallel_rank()
    # What stands in padding must not matter.
    own = torch.full((rows, weight.shape[1]), 3.0, dtype=weight.dtype)
    own[: vocabulary.real] = weight[vocabulary.first :][: vocabulary.real]
    own.requires_grad_()
    inputs = (hidden.chunk(tensor)[rank] if sequence else hidden).clone().requires_grad_()
    nats = chunked_cross_entropy(inputs, own, labels, vocabulary, chunk_size, sequence)
    for_inputs, for_weight = torch.autograd.grad(nats, [inputs, own], cotangent)
    assert not for_weight[vocabulary.real :].any()
    return [nats.detach(), for_inputs, for_weight[: vocabulary.real]]


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned, but those of one shape."""

    def __init__(self, left_out: torch.Size):
        super().__init__()
        self.left_out, self.elements = left_out, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape not in (self.left_out, self.left_out[::-1]):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def largest_of_chunked_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, cotangent: Tensor, chunk_size: int, cap: float | None
) -> int:
    """Elements of the largest tensor of both passes that is not shaped as the weight is."""
    build_topology(tiny_config())
    vocabulary = Vocabulary.of_this_rank(len(weight), len(weight), cap)
    inputs, own = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with _Largest(weight.shape) as largest:
        nats = chunked_cross_entropy(inputs, own, labels, vocabulary, chunk_size, sequence_parallel=False)
        torch.autograd.grad(nats, [inputs, own], cotangent)
    return largest.elements
