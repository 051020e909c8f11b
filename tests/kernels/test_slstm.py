"""The sLSTM: the reference against its unstabilised form, the torch form against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.slstm import SLSTMState, slstm
from tests.kernels.slstm_cases import INPUTS, assert_close, random_inputs, random_starts, values_and_gradients

KINDS = ["unset", "none", "first", "random", "consecutive"]
ALONE = [[float(index == only) for index in range(5)] for only in range(5)]


def unstabilised(gates: Tensor, recurrent: Tensor, bias: Tensor) -> Tensor:
    """From the zero state, exponentials taken as they are (float64, moderate gates only)."""
    hidden = cell = normalizer = gates.new_zeros(gates.shape[0], *gates.shape[3:])
    outputs = []
    for raw in (gates + bias).unbind(1):
        i, f, z, o = (raw + torch.einsum("ghde,bhe->bghd", recurrent, hidden)).unbind(1)
        cell = torch.sigmoid(f) * cell + torch.exp(i) * torch.tanh(z)
        normalizer = torch.sigmoid(f) * normalizer + torch.exp(i)
        hidden = torch.sigmoid(o) * cell / normalizer
        outputs.append(hidden)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_matches_the_unstabilised_form(backend: str) -> None:
    inputs = random_inputs(2, 23, 2, 5)[:3]
    hidden, final = slstm(*inputs, backend=backend)
    torch.testing.assert_close(hidden, unstabilised(*inputs), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final.hidden, hidden[:, -1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(2, 1, 1, 1), (3, 2, 2, 5), (2, 33, 2, 8), (1, 70, 3, 4)])
def test_float64_equals_the_reference(sizes: tuple[int, ...], kind: str) -> None:
    inputs, starts = random_inputs(*sizes), random_starts(kind, *sizes[:2])
    expected = values_and_gradients(inputs, starts, "reference")
    assert_close(values_and_gradients(inputs, starts, "torch"), expected, 1e-11)


@pytest.mark.parametrize("upstream", ALONE, ids=["hidden", "final_hidden", "cell", "normalizer", "stabilizer"])
@pytest.mark.parametrize("kind", ["unset", "random"])
def test_each_result_alone_gives_its_gradients(upstream: list[float], kind: str) -> None:
    # Closed inputs, so that the initial stabilizer and early tokens set the final one too.
    inputs, starts = random_inputs(3, 14, 2, 6, seed=3), random_starts(kind, 3, 14)
    inputs[0][:, :, 0] -= 3.0
    inputs[0][:, :, 1] += 3.0
    expected = values_and_gradients(inputs, starts, "reference", upstream=upstream)
    actual = values_and_gradients(inputs, starts, "torch", upstream=upstream)
    assert_close(actual, expected, 1e-11)
    if kind == "unset":
        names = INPUTS[:3] if upstream[4] else INPUTS
        assert all(expected[f"gradient of {name}"].abs().max() > 1e-6 for name in names)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 3), st.integers(1, 9)),
    kind=st.sampled_from(KINDS),
    gate_scale=st.sampled_from([0.5, 2.0, 6.0]),
    with_state=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_float32_matches_the_float64_reference(
    sizes: tuple[int, ...], kind: str, gate_scale: float, with_state: bool, seed: int
) -> None:
    inputs = [tensor.float() for tensor in random_inputs(*sizes, seed=seed, gate_scale=gate_scale)]
    starts = random_starts(kind, *sizes[:2])
    expected = values_and_gradients([t.double() for t in inputs], starts, "reference", with_state=with_state)
    actual = values_and_gradients(inputs, starts, "torch", dtype=torch.float32, with_state=with_state)
    # Gates of size 20 have float32 steps of 2e-6, and enter exponentials.
    assert_close(actual, expected, 1e-5 if gate_scale < 6 else 4e-5)


def test_a_long_memory_keeps_its_precision() -> None:
    """Forget gates near 1 for hundreds of tokens: rounding of the logarithm must not add up."""
    inputs = [tensor.float() for tensor in random_inputs(1, 400, 1, 6, gate_scale=1.0)]
    inputs[0][:, :, 1] += 9.0
    expected = values_and_gradients([t.double() for t in inputs], None, "reference")
    assert_close(values_and_gradients(inputs, None, "torch", dtype=torch.float32), expected, 2e-5)


@pytest.mark.parametrize("input_gate", [-200.0, 200.0])
@pytest.mark.parametrize("forget_gate", [-200.0, 200.0])
def test_saturated_gates(input_gate: float, forget_gate: float) -> None:
    inputs = [tensor.float() for tensor in random_inputs(2, 30, 2, 4)]
    inputs[0][:, :, 0] += input_gate
    inputs[0][:, :, 1] += forget_gate
    starts = random_starts("random", 2, 30)
    expected = values_and_gradients([t.double() for t in inputs], starts, "reference")
    # Gates of 200 have float32 steps of 1.5e-5, and sums of thirty of them of 5e-4.
    assert_close(values_and_gradients(inputs, starts, "torch", dtype=torch.float32), expected, 2e-3)


@pytest.mark.parametrize("kind", ["unset", "consecutive"])
def test_gradcheck(kind: str) -> None:
    inputs, starts = random_inputs(1, 6, 2, 2), random_starts(kind, 1, 6)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        hidden, final = slstm(
            *tensors[:3], initial_state=SLSTMState(*tensors[3:]), document_starts=starts, backend="torch"
        )
        return hidden, *final

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_zero_state_is_none(backend: str) -> None:
    """What is empty is the normalizer: nothing of a cell or stabilizer beside it is carried over."""
    inputs = random_inputs(2, 9, 2, 4)
    expected, final = slstm(*inputs[:3], backend=backend)
    zero = torch.zeros_like(inputs[3])
    for state in (SLSTMState(zero, zero, zero, zero), SLSTMState(zero, zero + 3.0, zero, zero + 50.0)):
        hidden, other = slstm(*inputs[:3], initial_state=state, backend=backend)
        torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(other, final, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packed_documents_equal_each_alone(backend: str) -> None:
    """Also with a first document whose input gates would drown the second through any soft reset."""
    inputs = random_inputs(2, 30, 2, 4)[:3]
    inputs[0][:, :13, 0] += 40.0
    edges = [0, 13, 14, 30]
    starts = torch.zeros(2, 30, dtype=torch.bool)
    starts[:, edges[:-1]] = True
    leaf = inputs[0].clone().requires_grad_()
    packed, packed_final = slstm(leaf, *inputs[1:], document_starts=starts, backend=backend)
    (packed_gradient,) = torch.autograd.grad(packed.square().sum(), leaf)
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        part = inputs[0][:, begin:end].clone().requires_grad_()
        alone, final = slstm(part, *inputs[1:], backend=backend)
        (gradient,) = torch.autograd.grad(alone.square().sum(), part)
        torch.testing.assert_close(packed[:, begin:end], alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(packed_gradient[:, begin:end], gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(packed_final, final, rtol=1e-10, atol=0)


def test_pieces_joined_by_the_state_equal_one_pass() -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs(2, 31, 2, 4)]
    expected = values_and_gradients(inputs, None, "torch")
    state, outputs = SLSTMState(*inputs[3:]), []
    for part in inputs[0].split([1, 12, 18], 1):
        hidden, state = slstm(part, *inputs[1:3], initial_state=state, backend="torch")
        outputs.append(hidden)
    results = [torch.cat(outputs, 1), *state]
    generator = torch.Generator().manual_seed(7)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in results)
    results += torch.autograd.grad(loss, inputs)
    assert_close(dict(zip(expected, (tensor.detach() for tensor in results), strict=True)), expected, 1e-11)


def test_any_strides_and_no_writing_to_inputs() -> None:
    inputs = [tensor.float() for tensor in random_inputs(2, 11, 2, 4)]
    expected = values_and_gradients(inputs, None, "torch", dtype=torch.float32)
    strided = [tensor.mT.contiguous().mT for tensor in inputs]
    strided[0] = inputs[0].permute(3, 1, 0, 2, 4).contiguous().permute(2, 1, 3, 0, 4)
    copies = [tensor.clone() for tensor in strided]
    assert_close(values_and_gradients(strided, None, "torch", dtype=torch.float32), expected, 1e-6)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(strided, copies, strict=True))


def test_gradients_can_be_taken_twice_from_one_graph() -> None:
    leaves = [tensor.requires_grad_() for tensor in random_inputs(2, 9, 2, 3)[:3]]
    hidden, final = slstm(*leaves, backend="torch")
    loss = hidden.square().sum() + final.stabilizer.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for gradient, again in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(gradient, again)


def test_bfloat16_gates_are_computed_in_float32() -> None:
    inputs = random_inputs(2, 20, 2, 4, gate_scale=1.0)
    inputs[0] = inputs[0].bfloat16().double()
    expected = values_and_gradients(inputs, None, "reference", upstream=(0, 1, 1, 1, 1))
    actual = values_and_gradients(inputs, None, "torch", dtype=torch.bfloat16, upstream=(0, 1, 1, 1, 1))
    # The hidden states and the gates' gradients alone are rounded, to 8 bits.
    rounded = ("hidden", "gradient of gates")
    assert_close({n: t for n, t in actual.items() if n in rounded}, {n: expected[n] for n in rounded}, 8e-3)
    exact = expected.keys() - set(rounded)
    assert_close({n: actual[n] for n in exact}, {n: expected[n] for n in exact}, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": torch.zeros(2, 0, 4, 2, 3)}, "at least one token"),
        ({"gates": torch.zeros(2, 5, 3, 2, 3)}, "gates must have shape"),
        ({"recurrent": torch.zeros(4, 2, 3, 4)}, "recurrent must have shape"),
        ({"bias": torch.zeros(4, 6)}, "bias must have shape"),
        ({"initial_state": SLSTMState(*(torch.zeros(2, 3, 2) for _ in range(4)))}, "initial_state.hidden"),
        ({"document_starts": torch.zeros(2, 6, dtype=torch.bool)}, "document_starts must have shape"),
        ({"document_starts": torch.zeros(2, 5)}, "must be bool"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"bias": torch.zeros(4, 2, 3, device="meta")}, "bias is on meta"),
    ],
)
def test_bad_arguments_are_refused(change: dict, message: str) -> None:
    arguments = {
        "gates": torch.zeros(2, 5, 4, 2, 3),
        "recurrent": torch.zeros(4, 2, 3, 3),
        "bias": torch.zeros(4, 2, 3),
    } | change
    with pytest.raises(ValueError, match=message):
        slstm(**arguments)
