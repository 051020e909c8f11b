"""The affine scan: the reference against the definition, the torch form against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.affine_scan import affine_scan, two_level_torch

NAMES = ("states", "d_coefficients", "d_inputs", "d_initial")


def random_inputs(
    batch: int, sequence: int, components: int | None, channels: int, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Float64 coefficients (about as often above as below one step's decay), inputs, initial state; a cotangent."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = (channels,) if components is None else (components, channels)
    matrix = state if components is None else (components, *state)
    # Spectral norms of about 0.7, so that the state neither dies at once nor grows.
    coefficients = 0.7 * normal(batch, sequence, *matrix) / (components or 1) ** 0.5
    inputs = [coefficients, normal(batch, sequence, *state), normal(batch, *state)]
    return inputs, normal(batch, sequence, *state)


def random_starts(kind: str, batch: int, sequence: int) -> Tensor | None:
    if kind == "unset":
        return None
    starts = torch.zeros(batch, sequence, dtype=torch.bool)
    if kind == "random":
        starts = torch.rand(batch, sequence, generator=torch.Generator().manual_seed(sequence)) < 0.2
    elif kind == "edges":
        starts[0, 0] = True
        starts[-1, -1] = True
    elif kind == "consecutive":
        starts[:, sequence // 2 : sequence // 2 + 3] = True
    return starts


def results(inputs: list[Tensor], cotangent: Tensor, dtype: torch.dtype = torch.float64, **options) -> list[Tensor]:
    """The states and the gradients of their product with ``cotangent``."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    states = affine_scan(leaves[0], leaves[1], initial=leaves[2], **options)
    return [states.detach(), *torch.autograd.grad((states * cotangent.to(dtype)).sum(), leaves)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.isfinite().all(), name
        error = (a.double() - e.double()).abs().max().item()
        assert error <= tolerance * max(e.abs().max().item(), 1e-3), f"{name}: {error:.1e}"


@pytest.mark.parametrize("reverse", [False, True])
def test_reference_is_the_definition(reverse: bool) -> None:
    (coefficients, inputs, initial), _ = random_inputs(1, 5, 2, 3)
    starts = torch.tensor([[False, False, True, False, False]])
    states = affine_scan(
        coefficients, inputs, initial=initial, document_starts=starts, reverse=reverse, backend="reference"
    )
    previous = initial[0]
    for token in (4, 3, 2, 1, 0) if reverse else (0, 1, 2, 3, 4):
        # The second document is tokens 2 to 4: entered at 2, or from behind at 1.
        if token == (1 if reverse else 2):
            previous = torch.zeros_like(previous)
        matrix = coefficients[0, token]
        previous = torch.stack([
            matrix[i, 0] * previous[0] + matrix[i, 1] * previous[1] + inputs[0, token, i] for i in range(2)
        ])  # fmt: skip
        torch.testing.assert_close(states[0, token], previous)


@pytest.mark.parametrize("kind", ["unset", "random", "edges", "consecutive"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("components", [None, 1, 2, 3])
def test_torch_equals_reference(components: int | None, reverse: bool, kind: str) -> None:
    for sequence in (1, 2, 15, 16, 61, 200):
        inputs, cotangent = random_inputs(2, sequence, components, 5, seed=sequence)
        options = {"document_starts": random_starts(kind, 2, sequence), "reverse": reverse}
        expected = results(inputs, cotangent, backend="reference", **options)
        assert_close(results(inputs, cotangent, backend="torch", **options), expected, 1e-12)
        single = results(inputs, cotangent, torch.float32, backend="torch", **options)
        assert_close(single, expected, 1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 120),
    components=st.sampled_from([None, 1, 2, 4]),
    channels=st.integers(1, 9),
    reverse=st.booleans(),
    rate=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 1000),
)
def test_any_shape(batch, sequence, components, channels, reverse, rate, seed) -> None:
    inputs, cotangent = random_inputs(batch, sequence, components, channels, seed)
    starts = torch.rand(batch, sequence, generator=torch.Generator().manual_seed(seed)) < rate
    options = {"document_starts": starts, "reverse": reverse}
    expected = results(inputs, cotangent, backend="reference", **options)
    assert_close(results(inputs, cotangent, backend="torch", **options), expected, 1e-11)


def test_wide_states_take_one_level(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, cotangent = random_inputs(2, 50, 2, 4)
    expected = results(inputs, cotangent, backend="reference")
    assert two_level_torch.chunk_count(50, 16) > 1
    monkeypatch.setattr(two_level_torch, "WIDE_STATE", 16)
    assert two_level_torch.chunk_count(50, 16) == 1
    assert_close(results(inputs, cotangent, backend="torch"), expected, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_initial_state_is_a_zero_one(backend: str) -> None:
    (coefficients, inputs, initial), _ = random_inputs(2, 30, None, 3)
    expected = affine_scan(coefficients, inputs, initial=torch.zeros_like(initial), backend=backend)
    torch.testing.assert_close(affine_scan(coefficients, inputs, backend=backend), expected, rtol=0, atol=0)


def test_packed_documents_equal_documents_alone() -> None:
    (coefficients, inputs, initial), _ = random_inputs(1, 40, 2, 3)
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[:, 17] = True
    for reverse in (False, True):
        packed = affine_scan(coefficients, inputs, initial=initial, document_starts=starts, reverse=reverse)
        first, second = (
            affine_scan(
                coefficients[:, part], inputs[:, part], reverse=reverse,
                initial=initial if continues else None,
            )
            for part, continues in ((slice(0, 17), not reverse), (slice(17, 40), reverse))
        )  # fmt: skip
        torch.testing.assert_close(packed, torch.cat((first, second), 1), rtol=1e-12, atol=1e-12)


def test_a_restart_stops_gradients_exactly() -> None:
    (coefficients, inputs, initial), _ = random_inputs(1, 30, None, 3)
    starts = torch.zeros(1, 30, dtype=torch.bool)
    starts[:, 12] = True
    leaves = [tensor.requires_grad_() for tensor in (coefficients, inputs, initial)]
    states = affine_scan(leaves[0], leaves[1], initial=leaves[2], document_starts=starts)
    d_coefficients, d_inputs, d_initial = torch.autograd.grad(states[:, 12:].square().sum(), leaves)
    assert d_inputs[:, :12].eq(0).all() and d_inputs[:, 12:].ne(0).all()
    assert d_coefficients[:, :13].eq(0).all() and d_coefficients[:, 13:].ne(0).all()
    assert d_initial.eq(0).all()


def test_strided_and_narrow_inputs() -> None:
    (coefficients, inputs, initial), cotangent = random_inputs(2, 33, None, 4)
    expected = results([coefficients, inputs, initial], cotangent, backend="reference")
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in (coefficients, inputs)]
    assert not strided[0].is_contiguous()
    assert_close(results([*strided, initial], cotangent, backend="torch"), expected, 1e-12)
    narrow = [tensor.bfloat16() for tensor in (coefficients, inputs)]
    states = affine_scan(*narrow, initial=initial.float(), backend="torch")
    exact = affine_scan(*(tensor.float() for tensor in narrow), initial=initial.float(), backend="torch")
    assert states.dtype == torch.bfloat16
    torch.testing.assert_close(states, exact.bfloat16(), rtol=0, atol=0)


def test_only_the_needed_gradients() -> None:
    (coefficients, inputs, _), cotangent = random_inputs(2, 40, 2, 3)
    gradients = []
    for backend in ("reference", "torch"):
        leaf = inputs.clone().requires_grad_()
        states = affine_scan(coefficients, leaf, backend=backend)
        gradients.append(torch.autograd.grad((states * cotangent).sum(), leaf)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "fast"}, "backend must be one of"),
        ({"coefficients": torch.zeros(2, 5, 4)}, r"coefficients must have shape \(2, 5, 3\)"),
        ({"inputs": torch.zeros(2, 0, 3)}, "inputs must have shape"),
        ({"inputs": torch.zeros(2, 5, 2, 3)}, r"coefficients must have shape \(2, 5, 2, 2, 3\)"),
        ({"initial": torch.zeros(2, 4)}, "initial must have shape"),
        ({"document_starts": torch.zeros(2, 5)}, "document_starts must be bool"),
        ({"document_starts": torch.zeros(5, 2, dtype=torch.bool)}, "document_starts must have shape"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    arguments = {"coefficients": torch.zeros(2, 5, 3), "inputs": torch.zeros(2, 5, 3)} | change
    with pytest.raises(ValueError, match=message):
        affine_scan(arguments.pop("coefficients"), arguments.pop("inputs"), **arguments)
