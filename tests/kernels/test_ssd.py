"""The state-space recurrence of Mamba-2 in torch: forward and every gradient against float64 through the plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.ssd import ssd

NAMES = ("values", "step_size", "decay_rate", "keys", "queries", "skip", "initial_state")


def random_inputs(
    batch: int, sequence: int, heads: int, head_size: int, groups: int, state_size: int, seed: int = 0
) -> dict[str, Tensor]:
    """Float64 inputs; steps and rates as large as at the start of a training run, and larger."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "values": normal(batch, sequence, heads, head_size),
        "step_size": torch.nn.functional.softplus(normal(batch, sequence, heads)),
        "decay_rate": -torch.exp(normal(heads)),
        "keys": normal(batch, sequence, groups, state_size),
        "queries": normal(batch, sequence, groups, state_size),
        "skip": normal(heads),
        "initial_state": normal(batch, heads, head_size, state_size),
    }


def run(inputs: dict[str, Tensor | None], starts: Tensor | None, **options: object) -> list[Tensor]:
    """Outputs, final state, and the gradient of every input there is, for fixed random cotangents."""
    leaves = {name: None if tensor is None else tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    given_leaves = dict(leaves)
    positional = [given_leaves.pop(name) for name in NAMES[:5]]
    results = ssd(*positional, **given_leaves, document_starts=starts, **options)
    generator = torch.Generator().manual_seed(99)
    # Drawn on the CPU in float64, so that every device and dtype gets the same.
    cotangents = [torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result) for result in results]
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    return [*(result.detach() for result in results), *torch.autograd.grad(results, wanted, cotangents)]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.shape == other.shape
        difference = (one.double() - other).abs().max().item() if other.numel() else 0.0
        scale = max(other.abs().max().item(), 1e-3) if other.numel() else 1.0
        assert difference <= tolerance * scale, f"result {index}: {difference:.2g} of {scale:.2g}"


def single(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.float() for name, tensor in inputs.items()}


def random_starts(batch: int, sequence: int, share: float = 0.2) -> Tensor:
    return torch.rand(batch, sequence, generator=torch.Generator().manual_seed(7)) < share


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    sequence=st.integers(1, 40),
    groups=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    head_size=st.integers(1, 5),
    state_size=st.integers(1, 6),
    chunk=st.integers(1, 48),
    documents=st.booleans(),
    skip=st.booleans(),
)
def test_exact_in_float64(
    batch, sequence, groups, heads_per_group, head_size, state_size, chunk, documents, skip
) -> None:
    inputs = random_inputs(batch, sequence, groups * heads_per_group, head_size, groups, state_size)
    if not skip:
        inputs["skip"] = None
    starts = random_starts(batch, sequence) if documents else None
    expected = run(inputs, starts, backend="reference")
    assert_same(run(inputs, starts, backend="torch", chunk_size=chunk), expected, 1e-11)


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("documents", [False, True])
def test_float32(chunk: int, documents: bool) -> None:
    inputs = random_inputs(2, 150, 4, 16, 2, 16)
    starts = random_starts(2, 150, 0.05) if documents else None
    expected = run(inputs, starts, backend="reference")
    results = run(single(inputs), starts, backend="torch", chunk_size=chunk)
    rate = 2 + NAMES.index("decay_rate")
    # A sum over all tokens of terms that nearly cancel.
    assert_same([results.pop(rate)], [expected.pop(rate)], 5e-5)
    # Sums over a hundred tokens in another order.
    assert_same(results, expected, 1e-5)


@pytest.mark.parametrize("positions", [[0], [0, 1, 2], [7, 8], [15, 16], [29], [0, 29], list(range(30))])
def test_a_document_in_a_pack_is_the_document_alone(positions: list[int]) -> None:
    inputs = random_inputs(1, 30, 2, 3, 1, 4)
    starts = torch.zeros(1, 30, dtype=torch.bool)
    starts[0, positions] = True
    outputs, final, *_ = run(inputs, starts, backend="torch", chunk_size=8)
    edges = sorted({0, *positions, 30})
    for first, last in zip(edges, edges[1:], strict=False):
        alone = {
            name: tensor[:, first:last] if name in ("values", "step_size", "keys", "queries") else tensor
            for name, tensor in inputs.items()
        }
        if starts[0, first]:
            alone["initial_state"] = torch.zeros_like(inputs["initial_state"])
        expected, state, *_ = run(alone, None, backend="torch", chunk_size=8)
        torch.testing.assert_close(outputs[:, first:last], expected)
    torch.testing.assert_close(final, state)


def test_what_a_start_cuts_off_has_no_gradient() -> None:
    inputs = random_inputs(1, 20, 2, 3, 1, 4)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, 11] = True
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    options = {name: leaves[name] for name in NAMES[5:]}
    outputs, _ = ssd(*(leaves[n] for n in NAMES[:5]), **options, document_starts=starts, chunk_size=8, backend="torch")
    outputs[:, 11:].sum().backward()
    assert leaves["initial_state"].grad.abs().max() == 0
    for name in ("values", "step_size", "keys"):
        gradient = leaves[name].grad
        # Contributions of decays to both sides of the start cancel but for float64's rounding.
        assert gradient[:, :11].abs().max() < 1e-13 and gradient[:, 11:].abs().max() > 1e-3, name


def test_segments_that_hand_on_the_state_are_one_pass() -> None:
    inputs = random_inputs(2, 33, 4, 3, 2, 4)
    whole = run(inputs, None, backend="torch", chunk_size=8)
    state, parts = inputs["initial_state"], []
    for first, last in ((0, 5), (5, 6), (6, 30), (30, 33)):
        pieces = [inputs[name] if name == "decay_rate" else inputs[name][:, first:last] for name in NAMES[:5]]
        output, state = ssd(*pieces, skip=inputs["skip"], initial_state=state, chunk_size=8, backend="torch")
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole[0])
    torch.testing.assert_close(state, whole[1])


def test_bfloat16_inputs_keep_a_float32_state() -> None:
    inputs = random_inputs(1, 40, 2, 8, 1, 8)
    rounded = {
        name: tensor.bfloat16() if name in ("values", "keys", "queries") else tensor.float()
        for name, tensor in inputs.items()
    }
    expected = run({name: tensor.double() for name, tensor in rounded.items()}, None, backend="reference")
    results = run(rounded, None, backend="torch")
    assert results[0].dtype == results[2].dtype == torch.bfloat16 and results[1].dtype == torch.float32
    # Outputs are rounded once, to 8 bits.
    assert_same(results, expected, 8e-3)


def test_strong_decay_and_long_sequences_stay_finite() -> None:
    inputs = single(random_inputs(1, 2000, 2, 4, 1, 4))
    inputs["decay_rate"] = torch.tensor([-50.0, -1e-4])
    for tensor in run(inputs, None, backend="torch"):
        assert tensor.isfinite().all()


def test_decoding_token_by_token() -> None:
    inputs = single(random_inputs(2, 9, 4, 3, 2, 4))
    whole, final, *_ = run(inputs, None, backend="torch")
    state, parts = inputs["initial_state"], []
    with torch.no_grad():
        for token in range(9):
            pieces = [inputs[n] if n == "decay_rate" else inputs[n][:, token : token + 1] for n in NAMES[:5]]
            output, state = ssd(*pieces, skip=inputs["skip"], initial_state=state)
            parts.append(output)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 3, 4)}, "values must be"),
        ({"keys": torch.zeros(1, 5, 3, 4)}, "2 heads cannot share the keys of 3 groups"),
        ({"keys": torch.zeros(1, 5, 4)}, "keys must be"),
        ({"queries": torch.zeros(1, 5, 1, 3)}, "queries must be"),
        ({"step_size": torch.zeros(1, 4, 2)}, "step_size must be"),
        ({"decay_rate": torch.zeros(3)}, "decay_rate must be"),
        ({"skip": torch.zeros(3)}, "skip must be"),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, "initial_state must be"),
        ({"document_starts": torch.zeros(1, 4, dtype=torch.bool)}, "document_starts must be"),
        ({"document_starts": torch.zeros(1, 5)}, "must be bool"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    inputs: dict = single(random_inputs(1, 5, 2, 3, 1, 4)) | change
    positional = [inputs.pop(name) for name in NAMES[:5]]
    with pytest.raises(ValueError, match=message):
        ssd(*positional, **inputs)
