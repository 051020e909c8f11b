"""Random problems for the tests of the Newton solvers, and the comparison with float64 autograd through the loop."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.newton_rnn import NewtonReport, newton_gru, newton_lstm
from kernels.newton_rnn.gru import GRUCell


def random_problem(
    cell: str, batch: int, sequence: int, channels: int, weight: float, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Float64 (gates, weights ..., initial state) with weights up to ``weight``; cotangents of hidden and final."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return weight * (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1)

    state = (batch, channels) if cell == "gru" else (batch, 2, channels)
    weights = [uniform(3, channels)] if cell == "gru" else [uniform(3, channels), uniform(2, channels)]
    problem = [normal(batch, sequence, 3, channels), *weights, normal(*state)]
    return problem, [normal(batch, sequence, channels), normal(*state)]


def starts_of(kind: str, batch: int, sequence: int) -> Tensor | None:
    """Where documents begin, for each kind that a packed batch can show."""
    if kind == "unset":
        return None
    starts = torch.zeros(batch, sequence, dtype=torch.bool)
    if kind == "random":
        starts = torch.rand(batch, sequence, generator=torch.Generator().manual_seed(sequence)) < 0.1
    elif kind == "edges":
        starts[0, 0] = starts[-1, -1] = True
    elif kind == "consecutive":
        starts[:, sequence // 2 : sequence // 2 + 3] = True
    return starts


def results(
    cell: str, problem: list[Tensor], cotangents: list[Tensor], dtype: torch.dtype, starts: Tensor | None = None,
    where: str = "cpu", function=None, **options,
) -> tuple[dict[str, Tensor], NewtonReport]:  # fmt: skip
    """Hidden states, final state and every gradient, float64 on the CPU, by name; and the report."""
    leaves = [tensor.to(where, dtype).requires_grad_() for tensor in problem]
    starts = None if starts is None else starts.to(where)
    function = function or {"gru": newton_gru, "lstm": newton_lstm}[cell]
    hidden, final, report = function(*leaves[:-1], initial_state=leaves[-1], document_starts=starts, **options)
    pairs = zip((hidden, final), cotangents, strict=True)
    loss = sum((value * direction.to(where, dtype)).sum() for value, direction in pairs)
    gradients = torch.autograd.grad(loss, leaves)
    names = ["hidden", "final", "d_gates", *["d_recurrent", "d_peephole"][: len(leaves) - 2], "d_initial"]
    tensors = (hidden, final, *gradients)
    return {name: t.detach().double().cpu() for name, t in zip(names, tensors, strict=True)}, report


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each result within ``tolerance`` of its largest value; 1e-3 is the scale of what a restart leaves at zero."""
    for name, value in expected.items():
        assert actual[name].isfinite().all(), f"{name} is not finite"
        error = (actual[name] - value).abs().max().item()
        assert error <= tolerance * max(value.abs().max().item(), 1e-3), f"{name}: {error:.1e}"


def check_diverging(where: str, backend: str, sequence: int) -> None:
    """Weights that send Newton's method to infinity: each token must still follow from the one before it.

    So chaotic a recurrence has no trajectory that two ways of rounding would share, but its single steps agree.
    """
    problem, _ = random_problem("gru", 2, sequence, 3, 30.0, seed=1)
    gates, recurrent, initial = (tensor.float().to(where) for tensor in problem)
    hidden, _, report = newton_gru(gates, recurrent, initial_state=initial, backend=backend)
    before = torch.cat((initial.unsqueeze(1), hidden[:, :-1]), dim=1)
    torch.testing.assert_close(hidden, GRUCell().step(before, gates, [recurrent]), rtol=0, atol=1e-4)
    assert report.fallbacks > 0
