"""Newton's method for nonlinear RNNs: the cells against plain equations, the solver against the loop over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.newton_rnn import newton_gru, newton_lstm, newton_rnn, newton_torch
from kernels.newton_rnn.arguments import choose_backend
from kernels.newton_rnn.cell import StepCell
from kernels.newton_rnn.gru import GRUCell
from kernels.newton_rnn.lstm import LSTMCell
from tests.kernels.newton_cases import assert_close, check_diverging, random_problem, results, starts_of

CELLS = ("gru", "lstm")
KINDS = ("unset", "random", "edges", "consecutive")


def gru_step(state: Tensor, gates: Tensor, recurrent: Tensor) -> Tensor:
    z = torch.sigmoid(gates[..., 0, :] + recurrent[0] * state)
    r = torch.sigmoid(gates[..., 1, :] + recurrent[1] * state)
    n = torch.tanh(gates[..., 2, :] + recurrent[2] * state * r)
    return (1 - z) * state + z * n


def lstm_step(state: Tensor, gates: Tensor, recurrent: Tensor, peephole: Tensor) -> Tensor:
    c, h = state[..., 0, :], state[..., 1, :]
    f = torch.sigmoid(gates[..., 0, :] + recurrent[0] * h + peephole[0] * c)
    g = torch.tanh(gates[..., 2, :] + recurrent[2] * h)
    new = f * c + (1 - f) * g
    o = torch.sigmoid(gates[..., 1, :] + recurrent[1] * h + peephole[1] * new)
    return torch.stack((new, o * torch.tanh(new)), dim=-2)


def oscillator_step(state: Tensor, drive: Tensor, stiffness: Tensor, friction: Tensor) -> Tensor:
    """Made up: a damped nonlinear spring of position, velocity and a leaky memory of their product."""
    position, velocity, memory = state.unbind(-2)
    force = drive[..., 0, :] - stiffness * torch.sin(position) - friction * velocity + 0.1 * memory
    velocity = 0.8 * velocity + 0.2 * torch.tanh(force)
    position = 0.9 * position + 0.2 * velocity
    return torch.stack((position, velocity, 0.5 * memory + position * torch.tanh(velocity + drive[..., 1, :])), -2)


STEPS = {"gru": (gru_step, None), "lstm": (lstm_step, 2)}


def as_user_cell(cell: str):
    """``newton_gru`` or ``newton_lstm`` made of the step alone."""
    step, components = STEPS[cell]

    def function(gates, *weights, **options):
        states, final, report = newton_rnn(step, gates, weights, components=components, **options)
        return states if components is None else states[:, :, -1], final, report

    return function


@pytest.mark.parametrize("cell", CELLS)
def test_reference_is_the_equations(cell: str) -> None:
    problem, _ = random_problem(cell, 2, 6, 3, weight=1.0)
    function = {"gru": newton_gru, "lstm": newton_lstm}[cell]
    starts = starts_of("consecutive", 2, 6)
    hidden, final, _ = function(*problem[:-1], initial_state=problem[-1], document_starts=starts, backend="reference")
    state = problem[-1]
    for token in range(6):
        state = torch.zeros_like(state) if starts[0, token] else state
        state = STEPS[cell][0](state, problem[0][:, token], *problem[1:-1])
        torch.testing.assert_close(hidden[:, token], state if cell == "gru" else state[:, 1])
    torch.testing.assert_close(final, state)


@pytest.mark.parametrize("cell", CELLS)
def test_written_derivatives_equal_automatic_ones(cell: str) -> None:
    problem, _ = random_problem(cell, 2, 4, 3, weight=1.5)
    written = {"gru": GRUCell, "lstm": LSTMCell}[cell]()
    automatic = StepCell(*STEPS[cell])
    shape = (2, 4, 3) if cell == "gru" else (2, 4, 2, 3)
    state, cotangent = (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    for a, e in zip(
        written.linearise(state, problem[0], problem[1:-1]),
        automatic.linearise(state, problem[0], problem[1:-1]),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    products = []
    for each in (written, automatic):
        jacobian, pullback = each.pullback(state, problem[0], problem[1:-1])
        gates, weights = pullback(cotangent)
        products.append((jacobian, gates, *weights))
    for a, e in zip(*products, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.02, 0.5, 3.0])
@pytest.mark.parametrize("cell", CELLS)
def test_torch_equals_reference(cell: str, weight: float, kind: str) -> None:
    for sequence in (1, 2, 33, 150):
        problem, cotangents = random_problem(cell, 2, sequence, 5, weight, seed=sequence)
        starts = starts_of(kind, 2, sequence)
        expected, _ = results(cell, problem, cotangents, torch.float64, starts, backend="reference")
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            actual, report = results(cell, problem, cotangents, dtype, starts, backend="torch")
            assert_close(actual, expected, tolerance)
            assert report.residual <= 64 * torch.finfo(dtype).eps
            assert report.iterations <= 8
            if weight <= 0.5:
                assert report.fallbacks == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    cell=st.sampled_from(CELLS),
    batch=st.integers(1, 3),
    sequence=st.integers(1, 90),
    channels=st.integers(1, 9),
    weight=st.sampled_from([0.1, 0.5, 1.0, 3.0]),
    kind=st.sampled_from(KINDS),
    backend=st.sampled_from(["torch", "sequential"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(cell, batch, sequence, channels, weight, kind, backend, seed) -> None:
    problem, cotangents = random_problem(cell, batch, sequence, channels, weight, seed)
    starts = starts_of(kind, batch, sequence)
    expected, _ = results(cell, problem, cotangents, torch.float64, starts, backend="reference")
    actual, _ = results(cell, problem, cotangents, torch.float64, starts, backend=backend)
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("kind", ["unset", "random"])
@pytest.mark.parametrize("weight", [0.5, 3.0])
@pytest.mark.parametrize("cell", CELLS)
def test_step_alone_is_enough(cell: str, weight: float, kind: str) -> None:
    problem, cotangents = random_problem(cell, 2, 45, 4, weight, seed=3)
    starts = starts_of(kind, 2, 45)
    expected, _ = results(cell, problem, cotangents, torch.float64, starts, backend="reference")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        actual, _ = results(cell, problem, cotangents, dtype, starts, function=as_user_cell(cell), backend="torch")
        assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("backend", ["torch", "sequential"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_of_three_components(kind: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 70, 2, 4), (4,), (4,), (2, 3, 4))
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    directions = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 70, 3, 4), (2, 3, 4))]
    found = []
    for name in ("reference", backend):
        states, final, report = newton_rnn(
            oscillator_step, leaves[0], leaves[1:3], components=3, initial_state=leaves[3],
            document_starts=starts_of(kind, 2, 70), backend=name,
        )  # fmt: skip
        loss = (states * directions[0]).sum() + (final * directions[1]).sum()
        found.append([states, final, *torch.autograd.grad(loss, leaves)])
    assert report.fallbacks == 0 and (report.iterations > 0) == (backend == "torch")
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cell", CELLS)
def test_blocks_chain_exactly(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, cotangents = random_problem(cell, 2, 100, 3, 0.5)
    starts = starts_of("random", 2, 100)
    expected, _ = results(cell, problem, cotangents, torch.float64, starts, backend="reference")
    for name, value in (("BLOCK_ELEMENTS", 1), ("MINIMUM_BLOCK", 7)):
        monkeypatch.setattr(newton_torch, name, value)
    assert newton_torch.block_length(problem[-1]) == 7
    assert_close(results(cell, problem, cotangents, torch.float64, starts, backend="torch")[0], expected, 1e-12)


@pytest.mark.parametrize("kind", ["unset", "random"])
@pytest.mark.parametrize("cell", CELLS)
def test_fallback_solves_only_what_did_not_converge(cell: str, kind: str) -> None:
    problem, cotangents = random_problem(cell, 2, 60, 4, 0.5)
    starts = starts_of(kind, 2, 60)
    expected, _ = results(cell, problem, cotangents, torch.float64, starts, backend="reference")
    options = {"iterations": 1, "max_iterations": 1, "backend": "torch"}
    actual, report = results(cell, problem, cotangents, torch.float64, starts, **options)
    assert_close(actual, expected, 1e-12)
    assert report.fallbacks == 2 and report.residual == 0 and report.iterations == 1
    _, loose = results(cell, problem, cotangents, torch.float64, starts, tolerance=10.0, **options)
    assert loose.fallbacks == 0 and 1e-6 < loose.residual < 10
    easy = problem[0].clone()
    easy[1] = 0.0
    easy_problem = [
        easy,
        *problem[1:-1],
        problem[-1] * torch.tensor([1.0, 0.0]).view(2, *[1] * (problem[-1].dim() - 1)),
    ]
    expected, _ = results(cell, easy_problem, cotangents, torch.float64, starts, backend="reference")
    actual, report = results(cell, easy_problem, cotangents, torch.float64, starts, **options)
    assert_close(actual, expected, 1e-12)
    assert report.fallbacks == 1


def test_a_diverging_solve_is_mended() -> None:
    check_diverging("cpu", "torch", sequence=150)


@pytest.mark.parametrize("cell", CELLS)
def test_newton_converges_quadratically(cell: str) -> None:
    problem, cotangents = random_problem(cell, 1, 64, 8, 0.5)
    residuals = []
    for iterations in (1, 2, 3, 4):
        options = {"iterations": iterations, "max_iterations": iterations, "tolerance": 1e3}
        residuals.append(
            float(results(cell, problem, cotangents, torch.float64, backend="torch", **options)[1].residual)
        )
    assert all(after <= 2 * before**2 + 1e-15 for before, after in zip(residuals, residuals[1:], strict=False))
    assert residuals[3] < 1e-9


def test_packed_documents_equal_documents_alone() -> None:
    problem, _ = random_problem("lstm", 1, 40, 3, 0.5)
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[:, [0, 21]] = True
    packed, final, _ = newton_lstm(*problem[:-1], initial_state=problem[-1], document_starts=starts)
    first, second = (newton_lstm(problem[0][:, part], *problem[1:3]) for part in (slice(0, 21), slice(21, 40)))
    torch.testing.assert_close(packed, torch.cat((first[0], second[0]), 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, second[1], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_decoding_token_by_token_equals_one_pass() -> None:
    problem, _ = random_problem("lstm", 2, 12, 3, 0.5)
    expected, expected_state, _ = newton_lstm(*problem[:3])
    state, hidden = None, []
    for token in range(12):
        step, state, _ = newton_lstm(problem[0][:, token : token + 1], *problem[1:3], initial_state=state)
        hidden.append(step)
    torch.testing.assert_close(torch.cat(hidden, 1), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)


def test_narrow_gates_are_computed_in_float32() -> None:
    problem, _ = random_problem("gru", 2, 40, 3, 0.5)
    gates = problem[0].bfloat16().requires_grad_()
    hidden, final, _ = newton_gru(gates, problem[1].float(), backend="torch")
    expected, expected_final, _ = newton_gru(gates.detach().float(), problem[1].float(), backend="torch")
    assert hidden.dtype == torch.bfloat16 and final.dtype == torch.float32
    torch.testing.assert_close(hidden, expected.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(final, expected_final, rtol=0, atol=0)
    hidden.sum().backward()
    assert gates.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("only", ["hidden", "final"])
def test_each_result_alone_gives_its_gradients(only: str) -> None:
    problem, cotangents = random_problem("lstm", 2, 30, 3, 0.5)
    gradients = []
    for backend in ("reference", "torch"):
        recurrent = problem[1].clone().requires_grad_()
        hidden, final, _ = newton_lstm(problem[0], recurrent, problem[2], backend=backend)
        loss = (hidden * cotangents[0]).sum() if only == "hidden" else (final * cotangents[1]).sum()
        gradients.append(torch.autograd.grad(loss, recurrent)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-11)


def test_auto_takes_the_fastest() -> None:
    assert choose_backend("auto", 64, False, False, True) == "torch"
    assert choose_backend("auto", 1 << 20, False, False, True) == "sequential"
    assert choose_backend("auto", 1 << 20, True, False, True) == "triton"
    assert choose_backend("auto", 1 << 20, True, True, True) == "torch"
    assert choose_backend("reference", 1 << 20, True, False, True) == "reference"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "fast"}, "backend must be one of"),
        ({"gates": torch.zeros(2, 5, 2, 3)}, "gates must have shape"),
        ({"recurrent": torch.zeros(2, 3)}, r"recurrent must have shape \(3, 3\)"),
        ({"peephole": torch.zeros(3, 3)}, r"peephole must have shape \(2, 3\)"),
        ({"initial_state": torch.zeros(2, 3)}, r"initial_state must have shape \(2, 2, 3\)"),
        ({"document_starts": torch.zeros(2, 5)}, "document_starts must be bool"),
        ({"iterations": 0}, "1 <= iterations"),
        ({"iterations": 9}, "iterations <= max_iterations"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    arguments = {
        "gates": torch.zeros(2, 5, 3, 3), "recurrent": torch.zeros(3, 3), "peephole": torch.zeros(2, 3),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        newton_lstm(**arguments)


def test_user_cells_have_no_kernel() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, reference, torch, sequential,"):
        newton_rnn(gru_step, torch.zeros(1, 2, 3, 4), [torch.zeros(3, 4)], backend="triton")
