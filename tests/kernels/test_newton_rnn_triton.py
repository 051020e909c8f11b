"""The Triton Newton solvers against float64 autograd through the loop over tokens.

Without a GPU the kernels run in Triton's interpreter, which computes fp32 exactly as written.
"""

import pytest
import torch

from kernels.launch import interpreter_is_active
from kernels.newton_rnn import newton_gru, newton_lstm, newton_triton
from tests.kernels.newton_cases import assert_close, check_diverging, random_problem, results, starts_of

CELLS = ("gru", "lstm")


@pytest.fixture(autouse=True)
def kernels_can_run():
    if not interpreter_is_active() and not torch.cuda.is_available():
        pytest.fail("Triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1.")


def device():
    return "cpu" if interpreter_is_active() else "cuda"


@pytest.fixture
def small_tiles(monkeypatch):
    """Few tokens per tile, so that short sequences have several tiles."""
    if interpreter_is_active():
        tiles = {k: tuple((entry[0], 8, 4, 1) for entry in entries) for k, entries in newton_triton.KERNELS.items()}
        monkeypatch.setattr(newton_triton, "KERNELS", tiles)


def compare(cell, sizes, weight, kind, **options):
    """The report, after the results were found right."""
    problem, cotangents = random_problem(cell, *sizes, weight, seed=sizes[1])
    starts = starts_of(kind, *sizes[:2])
    expected, _ = results(cell, problem, cotangents, torch.float64, starts, backend="reference")
    actual, report = results(
        cell, problem, cotangents, torch.float32, starts, where=device(), backend="triton", **options
    )
    assert_close(actual, expected, 1e-5)
    return report


@pytest.mark.parametrize("kind", ["unset", "random", "edges", "consecutive"])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_reference(small_tiles, cell, kind):
    for sizes in ((2, 1, 3), (1, 16, 4), (2, 21, 5)):
        report = compare(cell, sizes, 0.5, kind)
        assert report.fallbacks == 0 and report.residual <= 2e-6 and 3 <= report.iterations <= 8


@pytest.mark.parametrize("cell", CELLS)
def test_large_weights(small_tiles, cell):
    compare(cell, (2, 27, 4), 3.0, "random")


@pytest.mark.parametrize("kind", ["unset", "consecutive"])
@pytest.mark.parametrize("cell", CELLS)
def test_fallback_is_exact(small_tiles, cell, kind):
    report = compare(cell, (2, 19, 3), 1.0, kind, iterations=1, max_iterations=1)
    assert 1 <= report.fallbacks <= 6 and report.iterations == 1


@pytest.mark.parametrize("cell", CELLS)
def test_the_tiles_that_gpus_run(cell):
    compare(cell, (1, 40, 3), 0.5, "random")


def test_a_diverging_solve_is_mended():
    # A tile and a part of one.
    check_diverging(device(), "triton", sequence=40)


def test_programs_report_their_worst(small_tiles):
    """Loose settings: what is left after one step is reported rather than mended."""
    problem, cotangents = random_problem("gru", 2, 20, 5, 0.5)
    options = {"iterations": 1, "max_iterations": 1, "tolerance": 10.0}
    where = {"where": device()}
    _, expected = results("gru", problem, cotangents, torch.float32, backend="torch", **options)
    _, actual = results("gru", problem, cotangents, torch.float32, backend="triton", **where, **options)
    # One block of tokens in the torch form and three in the kernel: of the same order, not equal.
    assert 1e-6 < actual.residual <= 2 * expected.residual and actual.fallbacks == 0


def test_strided_gates_and_expanded_gradients(small_tiles):
    problem, _ = random_problem("gru", 2, 10, 4, 0.5)
    gradients = []
    for strided in (False, True):
        gates, recurrent = (tensor.float().to(device()) for tensor in problem[:2])
        gates = gates.transpose(1, 3).contiguous().transpose(1, 3) if strided else gates
        gates = gates.requires_grad_()
        newton_gru(gates, recurrent, backend="triton")[0].sum().backward()
        gradients.append(gates.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_narrow_gates(small_tiles):
    problem, _ = random_problem("gru", 1, 12, 4, 0.5)
    gates, recurrent = problem[0].half().to(device()), problem[1].float().to(device())
    hidden, final, _ = newton_gru(gates, recurrent, backend="triton")
    expected, expected_final, _ = newton_gru(gates.float(), recurrent, backend="reference")
    assert hidden.dtype == torch.float16 and final.dtype == torch.float32
    torch.testing.assert_close(hidden.float(), expected, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(final, expected_final, rtol=1e-5, atol=1e-6)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        newton_gru(*(tensor.to(device()) for tensor in random_problem("gru", 1, 2, 3, 0.5)[0][:2]), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS)
def test_many_tiles_on_a_gpu(cell):
    report = compare(cell, (2, 300, 100), 0.5, "random")
    # The largest rounding error of 60,000 states: 2.1e-6 was measured.
    assert report.fallbacks == 0 and report.residual <= 4e-6


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS)
def test_bf16_gates_on_a_gpu(cell):
    problem, cotangents = random_problem(cell, 2, 300, 100, 0.5)
    problem[0] = problem[0].bfloat16().double()
    cotangents[0] = cotangents[0].bfloat16().double()
    starts = starts_of("random", 2, 300)
    expected, _ = results(cell, problem, cotangents, torch.float64, starts, backend="reference")
    narrow = [problem[0].bfloat16(), *(tensor.float() for tensor in problem[1:])]
    leaves = [tensor.cuda().requires_grad_() for tensor in narrow]
    function = {"gru": newton_gru, "lstm": newton_lstm}[cell]
    hidden, final, _ = function(*leaves[:-1], initial_state=leaves[-1], document_starts=starts.cuda(), backend="triton")
    directions = [cotangents[0].bfloat16().cuda(), cotangents[1].float().cuda()]
    found = (hidden, final, *torch.autograd.grad((hidden, final), leaves, directions))
    for (name, value), actual in zip(expected.items(), found, strict=True):
        # Hidden states and the gates' gradients are rounded to 8 bits once; sums and states are float32.
        tolerance = 1e-2 if actual.dtype == torch.bfloat16 else 1e-5
        error = (actual.double().cpu() - value).norm()
        assert error <= tolerance * value.norm(), f"{name}: {error / value.norm():.1e}"
