"""Programs that run on every rank of a pool of workers."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.models.norm import GroupedRMSNorm
from pretrain.models.parameters import shard_of
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
