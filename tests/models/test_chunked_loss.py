"""Cross-entropy by chunks of positions: the same numbers and gradients, and no more logits at once than said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

LENGTH, ROWS, SIZE, TOKENS = 8, 3, 16, 53


def problem() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(LENGTH, ROWS, SIZE, generator=generator),
        "weight": torch.randn(TOKENS, SIZE, generator=generator),
        "labels": torch.randint(0, TOKENS, (LENGTH, ROWS), generator=generator),
        "cotangent": torch.randn(LENGTH, ROWS, generator=generator),
    }


def expected(hidden, weight, labels, cotangent, cap: float | None) -> list[torch.Tensor]:
    """Of all positions at once, in float64."""
    inputs, scale = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = inputs @ scale.t()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return [nats.detach(), *torch.autograd.grad(nats, [inputs, scale], cotangent.double())]


@pytest.mark.parametrize("chunk_size", [1, 5, 24, 100])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True), (4, True)])
def test_it_is_that_of_all_positions_at_once(tensor, sequence, cap, chunk_size, worker_pools) -> None:
    given = problem()
    results = worker_pools(tensor).run(
        "tests.models.programs",
        "chunked_loss",
        tensor=tensor,
        sequence=sequence,
        chunk_size=chunk_size,
        cap=cap,
        **given,
    )
    nats, for_hidden, for_weight = expected(**given, cap=cap)
    for found in results:
        torch.testing.assert_close(found[0], nats.float(), rtol=1e-5, atol=1e-5)
    parts = [found[1] for found in results]
    whole = torch.cat(parts) if sequence else parts[0]
    torch.testing.assert_close(whole, for_hidden.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([found[2] for found in results]), for_weight.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_no_more_logits_are_made_at_once_than_said(cap, worker_pools) -> None:
    program = "largest_of_chunked_loss"
    elements = worker_pools(1).run("tests.models.programs", program, cap=cap, chunk_size=12, **problem())
    # Half of all positions.
    assert elements == [12 * TOKENS]
