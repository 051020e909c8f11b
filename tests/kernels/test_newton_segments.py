"""Newton's method over segments on several ranks: the trajectory, the iterates and the gradients of one rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.newton_rnn import newton_gru, newton_lstm
from kernels.newton_rnn.newton_torch import MAXIMUM_BLOCK, block_length
from kernels.segments import Segments
from tests.kernels.newton_cases import random_problem, starts_of
from tests.segment_threads import on_segments

BATCH, CHANNELS = 2, 3
FUNCTIONS = {"gru": newton_gru, "lstm": newton_lstm}


def problem_of(cell: str, length: int, weight: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gates and weights, the cotangent of hidden states, and document starts."""
    (*tensors, _), (cotangent, _) = random_problem(cell, BATCH, length, CHANNELS, weight, seed=length)
    starts = starts_of("random", BATCH, length)
    starts[1] = False
    starts[:, 0] = True
    return tensors, cotangent, starts


def run(cell: str, tensors: list[Tensor], cotangent: Tensor, starts: Tensor, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    hidden, _, report = FUNCTIONS[cell](*leaves, document_starts=starts, **options)
    return hidden.detach(), torch.autograd.grad(hidden, leaves, cotangent), report


def on_ranks(cell: str, size: int, tensors: list[Tensor], cotangent: Tensor, starts: Tensor, **options):
    """Hidden states and gradients of the whole sequence, and each rank's report."""
    gates, *weights = tensors

    def work(segments: Segments):
        part = slice(segments.rank * gates.shape[1] // size, (segments.rank + 1) * gates.shape[1] // size)
        own = [gates[:, part], *weights]
        return run(cell, own, cotangent[:, part], starts[:, part], segments=segments, **options)

    found = on_segments(size, "gather", work)
    hidden = torch.cat([hidden for hidden, _, _ in found], 1)
    of_gates = torch.cat([gradients[0] for _, gradients, _ in found], 1)
    of_weights = [sum(parts) for parts in zip(*(gradients[1:] for _, gradients, _ in found), strict=True)]
    return hidden, (of_gates, *of_weights), [report for _, _, report in found]


def assert_same(found, expected, tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize("cell", FUNCTIONS)
@pytest.mark.parametrize("size", [2, 4])
def test_solution_and_gradients(cell: str, size: int) -> None:
    tensors, cotangent, starts = problem_of(cell, 12 * size, 0.5)
    expected = run(cell, tensors, cotangent, starts, backend="reference")
    found = on_ranks(cell, size, tensors, cotangent, starts)
    assert_same(found, expected, 1e-10)
    assert {report.fallbacks.item() for report in found[2]} == {0}


@pytest.mark.parametrize("cell", FUNCTIONS)
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_iterates_are_those_of_one_rank(cell: str, iterations: int) -> None:
    tensors, cotangent, starts = problem_of(cell, 40, 0.5)
    assert block_length(torch.empty(BATCH, 2, CHANNELS)) == MAXIMUM_BLOCK, "one block, so that one rank iterates on all"
    # So large a tolerance takes whatever the first look at the residual finds.
    options = {"iterations": iterations, "max_iterations": iterations, "tolerance": 1e9}
    expected = run(cell, tensors, cotangent, starts, backend="torch", **options)
    found = on_ranks(cell, 4, tensors, cotangent, starts, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    exact = run(cell, tensors, cotangent, starts, backend="reference")[0]
    assert iterations == 3 or (found[0] - exact).abs().max() > 1e-6, "converged already, which shows nothing"
    for report in found[2]:
        assert report.iterations.item() == expected[2].iterations.item() == iterations
        assert report.residual.item() == pytest.approx(expected[2].residual.item(), rel=1e-6)


@pytest.mark.parametrize("cell", FUNCTIONS)
def test_what_diverges_is_shot_at(cell: str) -> None:
    tensors, cotangent, starts = problem_of(cell, 80, 6.0)
    expected = run(cell, tensors, cotangent, starts, backend="reference")
    found = on_ranks(cell, 4, tensors, cotangent, starts)
    assert all(report.fallbacks.item() > 0 for report in found[2])
    assert_same(found, expected, 1e-8)


def test_single_tokens_on_each_rank() -> None:
    tensors, cotangent, starts = problem_of("lstm", 3, 0.5)
    expected = run("lstm", tensors, cotangent, starts, backend="reference")
    assert_same(on_ranks("lstm", 3, tensors, cotangent, starts), expected, 1e-10)


def test_an_initial_state_is_refused() -> None:
    tensors, _, _ = problem_of("gru", 4, 0.5)

    def work(segments: Segments):
        return newton_gru(*tensors, initial_state=torch.zeros(BATCH, CHANNELS), segments=segments)

    with pytest.raises(ValueError, match="newton_gru: the state before a segment is what segments say"):
        on_segments(2, "gather", work)
