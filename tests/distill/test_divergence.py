"""Divergence of logits, beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from pretrain.distill.divergence import divergence
from pretrain.parallel.topology import build_topology
from tests.configurations import tiny_config


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_torchs_with_its_gradient(temperature: float, reverse: bool) -> None:
    build_topology(tiny_config())
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 2, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    upstream = torch.rand(7, 2, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    logs = [(logits / temperature).log_softmax(-1) for logits in (student, teacher)]
    # torch's first argument is what is compared with the second.
    inputs = logs[::-1] if reverse else logs
    expected = kl_div(*inputs, log_target=True, reduction="none").sum(-1) * temperature**2
    found = divergence(student, teacher, temperature, reverse)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad((value * upstream).sum(), student)[0] for value in (found, expected)]
    assert gradients[1].abs().max() > 0.01
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_rows_behind_the_vocabulary_count_for_nothing() -> None:
    build_topology(tiny_config())
    student, teacher = torch.randn(2, 3, 1, 9)
    padded = [
        torch.cat([logits, torch.full((3, 1, 2), -torch.inf)], -1).requires_grad_() for logits in (student, teacher)
    ]
    found = divergence(*padded)
    torch.testing.assert_close(found, divergence(student, teacher))
    found.sum().backward()
    assert not padded[0].grad[..., 9:].any() and padded[0].grad[..., :9].all()
    assert padded[1].grad is None
