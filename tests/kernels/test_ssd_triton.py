"""The state-space recurrence on Triton kernels, in the interpreter where there is no GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from kernels.launch import interpreter_is_active
from kernels.ssd import ssd
from tests.kernels.test_ssd import NAMES, assert_same, random_inputs, random_starts, run, single

# (batch, sequence, heads, head_size, groups, state_size, chunk, documents, skip)
PROBLEMS = [
    (1, 40, 2, 16, 1, 16, 16, False, True),
    (2, 33, 4, 8, 2, 16, 16, True, True),
    (1, 70, 2, 20, 1, 40, 64, True, False),
    (1, 17, 3, 40, 3, 70, 32, True, True),
    (1, 1, 2, 4, 1, 4, 16, False, True),
    (1, 50, 6, 4, 2, 8, 32, False, True),
]


@pytest.fixture
def device() -> torch.device:
    if not interpreter_is_active() and not torch.cuda.is_available():
        pytest.fail("Triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1.")
    return torch.device("cpu" if interpreter_is_active() else "cuda")


@pytest.fixture(autouse=True)
def few_heads_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small problems share the heads of a group between programs too."""
    monkeypatch.setattr("kernels.ssd.triton_problem.HEADS_PER_PROGRAM", 2)


def assert_close(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    rate = 2 + NAMES.index("decay_rate")
    # A sum over all tokens of terms tens of times as large, which nearly cancel; a term that is missing gives 1e-1.
    assert_same([results.pop(rate)], [expected.pop(rate)], 3e-4)
    # float32: sums over dozens of tokens in another order.
    assert_same(results, expected, 1e-5)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_forward_and_every_gradient(problem: tuple, device: torch.device) -> None:
    *shape, chunk, documents, skip = problem
    inputs = random_inputs(*shape)
    if not skip:
        inputs["skip"] = None
    starts = random_starts(shape[0], shape[1], 0.1) if documents else None
    expected = run(inputs, starts, backend="reference")
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in single(inputs).items()}
    on_device = None if starts is None else starts.to(device)
    results = [tensor.cpu() for tensor in run(moved, on_device, backend="triton", chunk_size=chunk)]
    assert_close(results, expected)


@pytest.mark.parametrize("positions", [[0], [15, 16], [31], [0, 1, 2, 3], [16, 39]])
def test_documents_at_edges_of_chunks_and_tiles(positions: list[int], device: torch.device) -> None:
    inputs = random_inputs(1, 40, 2, 8, 1, 8)
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, positions] = True
    expected = run(inputs, starts, backend="reference")
    moved = {name: tensor.to(device) for name, tensor in single(inputs).items()}
    results = [tensor.cpu() for tensor in run(moved, starts.to(device), backend="triton", chunk_size=32)]
    assert_close(results, expected)


def test_strided_inputs(device: torch.device) -> None:
    inputs = {name: tensor.to(device) for name, tensor in single(random_inputs(2, 20, 4, 8, 2, 8)).items()}
    strided = dict(inputs)
    for name in ("values", "keys", "queries"):
        tensor = inputs[name]
        # As the mixer has them: the sequence first in memory, and a part of wider rows.
        wide = torch.zeros(tensor.shape[1], tensor.shape[0], *tensor.shape[2:-1], tensor.shape[-1] + 3, device=device)
        wide[..., : tensor.shape[-1]] = tensor.transpose(0, 1)
        strided[name] = wide.transpose(0, 1)[..., : tensor.shape[-1]]
    plain, other = (run(given, None, backend="triton", chunk_size=16) for given in (inputs, strided))
    for one, two in zip(plain, other, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_mixed_dtypes_are_refused(device: torch.device) -> None:
    inputs = {name: tensor.to(device) for name, tensor in single(random_inputs(1, 5, 2, 4, 1, 4)).items()}
    positional = [inputs[name] for name in ("values", "step_size", "decay_rate", "keys", "queries")]
    positional[3] = positional[3].bfloat16()
    with pytest.raises(ValueError, match="must share one dtype"):
        ssd(*positional, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 8])
def test_published_heads_in_bf16_on_a_gpu(groups: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs = random_inputs(2, 600, 16, 64, groups, 128)
    narrow = ("values", "keys", "queries")
    for name in narrow:
        inputs[name] = inputs[name].bfloat16().double()
    starts = random_starts(2, 600, 0.01)
    expected = run(inputs, starts, backend="reference")
    moved = {
        name: tensor.to(device, torch.bfloat16 if name in narrow else torch.float32) for name, tensor in inputs.items()
    }
    for chunk in (64, 256):
        results = run(moved, starts.to(device), backend="triton", chunk_size=chunk)
        for name, one, other in zip(("outputs", "final", *NAMES), results, expected, strict=True):
            # Scores, states and gradients are rounded to 8 bits before each matrix product; the rate's gradient is a
            # sum of terms that nearly cancel.
            tolerance = 5e-2 if name == "decay_rate" else 2e-2
            error = (one.double().cpu() - other).norm()
            assert error <= tolerance * other.norm(), f"chunks of {chunk}, {name}: {error / other.norm():.1e}"
