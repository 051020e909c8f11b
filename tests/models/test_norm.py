"""Norms over groups of channels that are split over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

SIZE = 24


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8, 24])
def test_groups_are_those_of_all_channels_whatever_the_ranks(groups: int, tensor: int, worker_pools) -> None:
    generator = torch.Generator().manual_seed(groups)
    hidden, cotangent = (torch.randn(5, 2, SIZE, generator=generator) for _ in range(2))
    weight = torch.randn(SIZE, generator=generator)
    results = worker_pools(tensor).run(
        "tests.models.programs",
        "grouped_norm",
        tensor=tensor,
        size=SIZE,
        groups=groups,
        hidden=hidden,
        weight=weight,
        cotangent=cotangent,
    )
    inputs, scale = hidden.double().requires_grad_(), weight.double().requires_grad_()
    normed = nn.functional.rms_norm(inputs.unflatten(-1, (groups, -1)), (SIZE // groups,), eps=1e-5)
    expected = normed.flatten(-2) * scale
    expected = [expected.detach(), *torch.autograd.grad(expected, [inputs, scale], cotangent.double())]
    for parts, whole in zip(zip(*results, strict=True), expected, strict=True):
        # float32: sums of two dozen terms.
        torch.testing.assert_close(torch.cat(parts, dim=-1), whole.float(), rtol=1e-5, atol=1e-5)
