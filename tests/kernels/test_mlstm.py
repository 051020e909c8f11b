"""The mLSTM: the reference against its closed form, the chunkwise torch form against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.mlstm import MLSTMState, mlstm

BATCH, HEADS, QUERY_KEY_SIZE, VALUE_SIZE = 2, 2, 8, 12
NAMES = (
    "hidden", "matrix", "normalizer", "stabilizer", "d_query", "d_key", "d_value", "d_input_gate",
    "d_forget_gate", "d_initial_matrix", "d_initial_normalizer", "d_initial_stabilizer",
)  # fmt: skip

# Gradients that are differences of terms as large as another gradient, and may cancel to nothing: <C, dC>
# with what the stabiliser routes back, and <q, dq> with <k, dk>, which is the gradient of the input gate.
CANCELLING = {"d_initial_stabilizer": "d_initial_matrix", "d_forget_gate": "d_input_gate"}


def random_inputs(
    sequence: int, seed: int = 0, gate_scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Query, key, value, input gate, forget gate and the three tensors of an initial state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gates = (
        2 * gate_scale * normal(BATCH, sequence, HEADS),
        gate_scale * (1 + 2 * normal(BATCH, sequence, HEADS)),
    )
    inputs = [
        normal(BATCH, sequence, HEADS, QUERY_KEY_SIZE),
        normal(BATCH, sequence, HEADS, QUERY_KEY_SIZE),
        normal(BATCH, sequence, HEADS, VALUE_SIZE),
        *(gate.clamp(-15, 15) for gate in gates),
        normal(BATCH, HEADS, QUERY_KEY_SIZE, VALUE_SIZE),
        normal(BATCH, HEADS, QUERY_KEY_SIZE),
        normal(BATCH, HEADS),
    ]
    return [tensor.to(dtype) for tensor in inputs]


def random_starts(kind: str, sequence: int) -> Tensor | None:
    """Where documents begin, for each kind that a packed batch can show."""
    if kind == "unset":
        return None
    starts = torch.zeros(BATCH, sequence, dtype=torch.bool)
    if kind == "random":
        starts = torch.rand(BATCH, sequence, generator=torch.Generator().manual_seed(sequence)) < 0.1
    elif kind == "first":
        starts[0, 0] = True
    elif kind == "consecutive":
        starts[0, sequence // 2 : sequence // 2 + 3] = True
        starts[1, -1] = True
    return starts


def outputs_and_gradients(inputs: list[Tensor], seed: int = 1, **options) -> dict[str, Tensor]:
    """Hidden states, final state and the gradients of a random linear function of all of them."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    hidden, state = mlstm(*inputs[:5], initial_state=MLSTMState(*inputs[5:]), **options)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for tensor in (hidden, *state):
        loss = loss + (tensor.double() * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)).sum()
    results = (hidden, *state, *torch.autograd.grad(loss, inputs))
    return dict(zip(NAMES, (tensor.detach() for tensor in results), strict=True))


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of every tensor relative to the largest entry of the expected one."""
    assert actual.keys() == expected.keys()
    errors = {}
    for name, tensor in expected.items():
        scale = tensor.double().abs().max().clamp_min(1e-3)
        if name in CANCELLING:
            scale = torch.maximum(scale, expected[CANCELLING[name]].double().abs().max())
        errors[name] = ((actual[name].double() - tensor.double()).abs().max() / scale).item()
    return errors


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, error in relative_errors(actual, expected).items():
        assert error <= tolerance, f"{name}: relative error {error:.2e} exceeds {tolerance:.0e}"


def assert_as_precise_as_the_loop(inputs: list[Tensor], **options) -> None:
    """For inputs that amplify rounding: float32 chunkwise errs at most 4 times what the float32 loop does."""
    truth = outputs_and_gradients([t.double() for t in inputs], backend="reference", **options)
    chunkwise = outputs_and_gradients(inputs, backend="torch", **options)
    loop = relative_errors(outputs_and_gradients(inputs, backend="reference", **options), truth)
    for name, error in relative_errors(chunkwise, truth).items():
        assert chunkwise[name].isfinite().all(), name
        allowed = max(1e-5, 4 * loop[name])
        assert error <= allowed, f"{name}: relative error {error:.2e} exceeds {allowed:.0e}"


def closed_form(query: Tensor, key: Tensor, value: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
    """The fully parallel form without any stabiliser, from the zero state (float64, moderate gates only)."""
    running = torch.nn.functional.logsigmoid(forget_gate).cumsum(1).transpose(1, 2)
    sequence = query.shape[1]
    exponents = running[..., :, None] - running[..., None, :] + input_gate.transpose(1, 2)[..., None, :]
    causal = torch.ones(sequence, sequence, dtype=torch.bool).tril()
    exponents = exponents.masked_fill(~causal, -torch.inf)
    weights = torch.einsum("bthk,bshk->bhts", query, key) * query.shape[-1] ** -0.5 * exponents.exp()
    stabilizer = torch.maximum(exponents.amax(-1), running)
    denominator = weights.sum(-1).abs().clamp_min(1.0) + 1e-2 * stabilizer.exp()
    return (weights @ value.transpose(1, 2) / denominator[..., None]).transpose(1, 2)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_matches_the_closed_form(backend: str) -> None:
    inputs = random_inputs(33)[:5]
    hidden, _ = mlstm(*inputs, epsilon=1e-2, chunk_size=8, backend=backend)
    torch.testing.assert_close(hidden, closed_form(*inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["unset", "none", "first", "random", "consecutive"])
@pytest.mark.parametrize("sequence, chunk_size", [(1, 64), (7, 64), (64, 64), (65, 64), (130, 64), (130, 16), (5, 1)])
def test_float32_matches_the_float64_reference(sequence: int, chunk_size: int, kind: str) -> None:
    inputs = random_inputs(sequence, dtype=torch.float32)
    starts = random_starts(kind, sequence)
    expected = outputs_and_gradients([t.double() for t in inputs], document_starts=starts, backend="reference")
    actual = outputs_and_gradients(inputs, document_starts=starts, chunk_size=chunk_size, backend="torch")
    # Sums of about 100 float32 terms, divided by a normalizer that can be a small difference of large terms.
    assert_close(actual, expected, 3e-5)


@pytest.mark.parametrize("kind", ["unset", "random", "consecutive"])
def test_float64_equals_the_reference(kind: str) -> None:
    """A large epsilon makes the stabiliser's own gradient as large as the others; 1e-10 leaves none out."""
    for seed in range(3):
        inputs, starts = random_inputs(45, seed), random_starts(kind, 45)
        options = {"document_starts": starts, "epsilon": 0.3}
        expected = outputs_and_gradients(inputs, backend="reference", **options)
        assert_close(outputs_and_gradients(inputs, chunk_size=16, backend="torch", **options), expected, 1e-10)


def test_long_strong_forgetting_keeps_precision() -> None:
    """Log forget gates that sum to hundreds inside a chunk must not cost the weights their last digits."""
    assert_as_precise_as_the_loop(random_inputs(200, gate_scale=4.0, dtype=torch.float32), epsilon=1e-2)


def test_retention_after_strong_forgetting_is_exact() -> None:
    """Running sums of -600 have float32 steps of 6e-5; weights of well remembered tokens must not show them."""
    inputs = random_inputs(64, dtype=torch.float32)
    # Positive queries and keys keep the normalizer from cancelling, so nothing else amplifies rounding.
    inputs[0], inputs[1], inputs[6] = inputs[0].abs(), inputs[1].abs(), inputs[6].abs()
    inputs[4][:, :40], inputs[4][:, 40:] = -15.0, 5.0
    expected = outputs_and_gradients([t.double() for t in inputs], backend="reference")
    assert_close(outputs_and_gradients(inputs, backend="torch"), expected, 3e-6)


@pytest.mark.parametrize("input_gate", [-15.0, 15.0])
@pytest.mark.parametrize("forget_gate", [-15.0, 15.0])
def test_saturated_gates(input_gate: float, forget_gate: float) -> None:
    """A state of one token makes hidden states nearly independent of the query, so its gradient cancels."""
    inputs = random_inputs(100, dtype=torch.float32)
    inputs[3] = torch.full_like(inputs[3], input_gate) + 0.01 * inputs[3]
    inputs[4] = torch.full_like(inputs[4], forget_gate) + 0.01 * inputs[4]
    assert_as_precise_as_the_loop(inputs, document_starts=random_starts("random", 100))


@pytest.mark.parametrize("kind", ["unset", "consecutive"])
def test_gradcheck(kind: str) -> None:
    inputs = [tensor[:1, ..., :2] if tensor.dim() == 4 else tensor[:1] for tensor in random_inputs(7)]
    inputs[6] = inputs[6][..., :2]
    inputs[5] = inputs[5][:, :, :2]
    starts = None if kind == "unset" else random_starts(kind, 7)[:1]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        hidden, state = mlstm(
            *tensors[:5],
            initial_state=MLSTMState(*tensors[5:]),
            document_starts=starts,
            chunk_size=3,
            epsilon=0.1,
            backend="torch",
        )
        return hidden, *state

    assert torch.autograd.gradcheck(function, [tensor.clone().requires_grad_() for tensor in inputs])


def test_two_segments_joined_by_the_state_equal_one_pass() -> None:
    whole = outputs_and_gradients(random_inputs(75, dtype=torch.float32), chunk_size=16, backend="torch")
    inputs = [tensor.requires_grad_() for tensor in random_inputs(75, dtype=torch.float32)]
    state, hidden = MLSTMState(*inputs[5:]), []
    for segment in (slice(0, 40), slice(40, 75)):
        part, state = mlstm(
            *(tensor[:, segment] for tensor in inputs[:5]),
            initial_state=state,
            chunk_size=16,
            backend="torch",
        )
        hidden.append(part)
    results = [torch.cat(hidden, 1), *state]
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (tensor.double() * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)).sum()
        for tensor in results
    )
    results += torch.autograd.grad(loss, inputs)
    # float32 in another order of summation.
    assert_close(dict(zip(NAMES, results, strict=True)), whole, 3e-5)


@pytest.mark.parametrize("backend, chunk_size", [("reference", 1), ("torch", 16), ("torch", 64)])
def test_packed_documents_equal_each_alone(backend: str, chunk_size: int) -> None:
    """Also with a first document whose input gates would drown the second through any soft reset."""
    inputs = random_inputs(50)[:5]
    inputs[3][:, :23], inputs[3][:, 23:] = inputs[3][:, :23] + 14, inputs[3][:, 23:] - 12
    boundaries, final_states = [0, 23, 24, 50], []
    starts = torch.zeros(BATCH, 50, dtype=torch.bool)
    starts[:, boundaries[:-1]] = True

    def hidden_and_gradients(part: slice, starts: Tensor | None) -> list[Tensor]:
        leaves = [tensor[:, part].clone().requires_grad_() for tensor in inputs]
        hidden, state = mlstm(*leaves, document_starts=starts, chunk_size=chunk_size, backend=backend)
        final_states.append(state)
        loss = hidden.square().sum() + (state.matrix.sum() if part.stop == 50 else 0.0)
        return [hidden, *torch.autograd.grad(loss, leaves)]

    packed = hidden_and_gradients(slice(0, 50), starts)
    for begin, end in zip(boundaries[:-1], boundaries[1:], strict=True):
        alone = hidden_and_gradients(slice(begin, end), None)
        for packed_tensor, alone_tensor in zip(packed, alone, strict=True):
            scale = alone_tensor.abs().max().clamp_min(1e-6).item()
            torch.testing.assert_close(packed_tensor[:, begin:end], alone_tensor, rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(final_states[0], final_states[-1], rtol=1e-10, atol=0)


def test_sequence_first_and_sliced_inputs_equal_contiguous_ones() -> None:
    inputs = random_inputs(37, dtype=torch.float32)
    expected = outputs_and_gradients(inputs, chunk_size=16, backend="torch")
    sequence_first = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs[:5]]
    assert_close(outputs_and_gradients(sequence_first + inputs[5:], chunk_size=16, backend="torch"), expected, 0.0)
    fused = torch.cat(inputs[:3], -1)
    sliced = list(fused.split([QUERY_KEY_SIZE, QUERY_KEY_SIZE, VALUE_SIZE], -1)) + inputs[3:]
    assert_close(outputs_and_gradients(sliced, chunk_size=16, backend="torch"), expected, 0.0)


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    inputs = [tensor.bfloat16() for tensor in random_inputs(70)[:5]] + random_inputs(70, dtype=torch.float32)[5:]
    expected = outputs_and_gradients([tensor.float() for tensor in inputs], backend="torch")
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            actual = outputs_and_gradients(inputs, backend="torch")
        assert actual["hidden"].dtype == actual["d_query"].dtype == torch.bfloat16
        assert actual["matrix"].dtype == torch.float32
        # One rounding to bfloat16 (2**-9) of each result; nothing inside is rounded.
        assert_close(actual, expected, 2**-8)
        assert_close({"matrix": actual["matrix"]}, {"matrix": expected["matrix"]}, 1e-6)


def test_only_the_needed_gradients() -> None:
    """A loss on the final state alone, and inputs that take no gradient."""
    inputs = random_inputs(20)
    gradients = []
    for backend in ("reference", "torch"):
        key = inputs[1].clone().requires_grad_()
        _, state = mlstm(inputs[0], key, *inputs[2:5], chunk_size=8, backend=backend)
        gradients.append(torch.autograd.grad(state.normalizer.square().sum(), key)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_decoding_token_by_token_equals_one_pass() -> None:
    inputs = random_inputs(12)[:5]
    expected, expected_state = mlstm(*inputs, backend="torch")
    state, hidden = None, []
    for token in range(12):
        step, state = mlstm(*(t[:, token : token + 1] for t in inputs), initial_state=state, backend="torch")
        hidden.append(step)
    torch.testing.assert_close(torch.cat(hidden, 1), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-10, atol=1e-12)


def test_auto_picks_torch_on_the_cpu() -> None:
    inputs = random_inputs(9)[:5]
    torch.testing.assert_close(mlstm(*inputs)[0], mlstm(*inputs, backend="torch")[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "fast"}, "backend must be one of"),
        ({"key": torch.zeros(2, 4, 2, 3)}, r"key must have shape \(2, 5, 2, 3\)"),
        ({"query": torch.zeros(2, 0, 2, 3)}, "query must have shape"),
        ({"value": torch.zeros(2, 5, 2)}, "value must have shape"),
        ({"forget_gate": torch.zeros(2, 5)}, "forget_gate must have shape"),
        ({"document_starts": torch.zeros(2, 5)}, "document_starts must be bool"),
        ({"document_starts": torch.zeros(5, 2, dtype=torch.bool)}, "document_starts must have shape"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        (
            {"initial_state": MLSTMState(torch.zeros(2, 2, 4, 3), torch.zeros(2, 2, 3), torch.zeros(2, 2))},
            "initial_state.matrix must have shape",
        ),
    ],
)
def test_wrong_inputs_are_refused(change: dict, message: str) -> None:
    arguments = {
        "query": torch.zeros(2, 5, 2, 3),
        "key": torch.zeros(2, 5, 2, 3),
        "value": torch.zeros(2, 5, 2, 4),
        "input_gate": torch.zeros(2, 5, 2),
        "forget_gate": torch.zeros(2, 5, 2),
    } | change
    with pytest.raises(ValueError, match=message):
        mlstm(**arguments)
