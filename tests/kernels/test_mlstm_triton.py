"""The Triton mLSTM against the float64 loop over tokens: values, states and every gradient.

Without a GPU the kernels run in Triton's interpreter, which computes fp32 exactly as written.
"""

import pytest
import torch

from kernels.launch import interpreter_is_active
from kernels.mlstm.chunkwise_triton import mlstm_triton
from kernels.mlstm.reference import mlstm_reference
from kernels.mlstm.state import MLSTMState

# Sums of about a hundred fp32 terms, divided by denominators that may cancel: 1e-5 was measured at worst,
# while dropping any one term of the backward pass gives 1e-2 and more.
TOLERANCE = 5e-5

NAMES = (
    "query", "key", "value", "input_gate", "forget_gate", "matrix", "normalizer", "stabilizer"
)  # fmt: skip


@pytest.fixture(autouse=True)
def kernels_can_run():
    if not interpreter_is_active() and not torch.cuda.is_available():
        pytest.fail("Triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1.")


def device():
    return "cpu" if interpreter_is_active() else "cuda"


def make_inputs(
    batch, sequence, heads, query_key_size, value_size, *, seed=0, gate_scale=1.0, closed_inputs=False,
    document_rate=0.0,
):  # fmt: skip
    """Float64 inputs in the order of NAMES, and document starts or None."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    token = (batch, sequence, heads)
    tensors = [normal(*token, size) for size in (query_key_size, query_key_size, value_size)]
    tensors += [(normal(*token) * gate_scale).clamp(-15, 15) for _ in range(2)]
    if closed_inputs:
        # The stabilizer that a state or document starts with then outlasts the inputs for a while.
        tensors[3], tensors[4] = tensors[3] - 4.0, tensors[4] + 3.0
    tensors += [normal(batch, heads, query_key_size, value_size), normal(batch, heads, query_key_size)]
    tensors += [normal(batch, heads)]
    starts = torch.rand(batch, sequence, generator=generator) < document_rate if document_rate else None
    return tensors, starts


def run(function, tensors, starts, dtype, *, with_state=True, where="cpu", upstream=(1, 1, 1, 1), **options):
    """Outputs and final state, and gradients of a random linear functional of them, as float64 on the CPU."""
    leaves = [tensor.to(where, dtype if index < 3 else max_precision(dtype)).requires_grad_()
              for index, tensor in enumerate(tensors)]  # fmt: skip
    state = MLSTMState(*leaves[5:]) if with_state else None
    starts = None if starts is None else starts.to(where)
    output, final = function(*leaves[:5], initial_state=state, document_starts=starts, **options)
    results = [output, *final]
    generator = torch.Generator().manual_seed(99)
    loss = 0.0
    for result, factor in zip(results, upstream, strict=True):
        direction = torch.randn(result.shape, generator=generator, dtype=torch.float64) * factor
        loss = loss + (result * direction.to(where, result.dtype)).sum()
    gradients = torch.autograd.grad(loss, leaves if with_state else leaves[:5])
    return [x.detach().double().cpu() for x in results], [x.double().cpu() for x in gradients]


def max_precision(dtype):
    """Gates and states stay fp32 when queries, keys and values are narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(actual, expected, name, tolerance=TOLERANCE):
    """Compare norms. 1e-6 is what is left of sums of terms of size one that cancel in fp32."""
    scale = expected.norm()
    error = (actual - expected).norm()
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    assert error <= tolerance * scale + 1e-6, f"{name}: relative error {error / scale:.1e}"


def compare(tensors, starts, *, chunk_size, epsilon=1e-6, with_state=True, upstream=(1, 1, 1, 1),
            dtype=torch.float32, tolerance=TOLERANCE):  # fmt: skip
    if dtype != torch.float32:
        tensors = [t.to(dtype).double() if i < 3 else t for i, t in enumerate(tensors)]
    options = {"epsilon": epsilon, "with_state": with_state, "upstream": upstream}
    expected = run(mlstm_reference, tensors, starts, torch.float64, **options)
    actual = run(mlstm_triton, tensors, starts, dtype, where=device(), chunk_size=chunk_size, **options)
    for name, a, e in zip(("output", "final matrix", "final normalizer", "final stabilizer"), actual[0],
                          expected[0], strict=True):  # fmt: skip
        assert_close(a, e, name, tolerance)
    for name, a, e in zip(NAMES, actual[1], expected[1], strict=False):
        assert_close(a, e, f"gradient of {name}", tolerance)


CASES = {
    # sizes: batch, sequence, heads, query_key_size, value_size
    "zero state, whole chunks": dict(sizes=(1, 32, 2, 16, 16), chunk_size=16, with_state=False),
    "ragged tail": dict(sizes=(2, 37, 1, 16, 32), chunk_size=16),
    "one token": dict(sizes=(1, 1, 2, 16, 16), chunk_size=64),
    "several tiles in a chunk": dict(sizes=(1, 150, 1, 16, 16), chunk_size=128, document_rate=0.03),
    "documents": dict(sizes=(2, 50, 2, 16, 16), chunk_size=16, document_rate=0.1),
    "documents of one token": dict(sizes=(1, 40, 1, 16, 16), chunk_size=16, document_rate=0.7),
    "sizes 96 and 192": dict(sizes=(1, 20, 1, 96, 192), chunk_size=16),
    "sizes 24 and 40": dict(sizes=(1, 40, 2, 24, 40), chunk_size=32, document_rate=0.05),
    "size below the smallest tile": dict(sizes=(1, 20, 1, 5, 3), chunk_size=16),
    "wide gates": dict(sizes=(1, 70, 2, 16, 16), chunk_size=32, gate_scale=5.0),
    "epsilon of weight": dict(sizes=(1, 40, 2, 16, 16), chunk_size=16, epsilon=0.1, document_rate=0.05),
    "epsilon of weight, closed inputs": dict(
        sizes=(1, 45, 2, 16, 16), chunk_size=16, epsilon=0.1, document_rate=0.1, closed_inputs=True
    ),
    "epsilon of weight, wide gates": dict(sizes=(1, 60, 2, 16, 16), chunk_size=32, epsilon=0.1, gate_scale=4.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_reference(case):
    case = dict(case)
    generated = {name: case.pop(name) for name in ("gate_scale", "document_rate", "closed_inputs") if name in case}
    tensors, starts = make_inputs(*case.pop("sizes"), seed=3, **generated)
    compare(tensors, starts, **case)


@pytest.mark.parametrize("only", range(4), ids=["output", "matrix", "normalizer", "stabilizer"])
def test_each_result_alone_gives_its_gradients(only):
    tensors, _ = make_inputs(1, 36, 1, 16, 16, seed=5, closed_inputs=True)
    compare(tensors, None, chunk_size=16, epsilon=0.05, upstream=[index == only for index in range(4)])


@pytest.mark.parametrize("document_rate", [0.0, 0.1])
def test_gates_at_the_soft_cap(document_rate):
    tensors, starts = make_inputs(1, 80, 1, 16, 16, seed=7, gate_scale=100.0, document_rate=document_rate)
    assert tensors[3].abs().eq(15).float().mean() > 0.8
    # Decays add up to -960 in a chunk of 64, where one fp32 unit is 6e-5: that is the exponents' error.
    compare(tensors, starts, chunk_size=64, tolerance=5e-4)


def test_two_segments_joined_are_one_pass():
    tensors, starts = make_inputs(1, 45, 2, 16, 16, seed=11, document_rate=0.05)
    tensors[4] = tensors[4] + 3.0

    def joined(*inputs, initial_state, document_starts, **options):
        outputs, state = [], initial_state
        for part in (slice(0, 19), slice(19, 45)):
            pieces = [tensor[:, part] for tensor in inputs]
            output, state = mlstm_triton(
                *pieces, initial_state=state, document_starts=document_starts[:, part], **options
            )
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    options = {"where": device(), "chunk_size": 16}
    one = run(mlstm_triton, tensors, starts, torch.float32, **options)
    two = run(joined, tensors, starts, torch.float32, **options)
    for index, (a, e) in enumerate(zip([*two[0], *two[1]], [*one[0], *one[1]], strict=True)):
        assert_close(a, e, f"result {index}")


def test_packed_documents_equal_documents_alone():
    tensors, _ = make_inputs(1, 40, 2, 16, 16, seed=13)
    inputs = [tensor.float().to(device()) for tensor in tensors[:5]]
    starts = torch.zeros(1, 40, dtype=torch.bool, device=device())
    starts[:, [0, 21]] = True
    packed, _ = mlstm_triton(*inputs, document_starts=starts, chunk_size=16)
    alone = [
        mlstm_triton(*(tensor[:, part] for tensor in inputs), chunk_size=16)[0]
        for part in (slice(0, 21), slice(21, 40))
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=TOLERANCE, atol=TOLERANCE)


def test_strided_inputs_and_expanded_gradients():
    tensors, _ = make_inputs(2, 20, 2, 16, 16, seed=17)
    expected = [tensor.float().to(device()).requires_grad_() for tensor in tensors[:5]]
    reference = mlstm_triton(*expected, chunk_size=16)[0]
    reference.sum().backward()
    # Queries, keys and values as slices of one projection, heads before tokens.
    fused = torch.cat([t.detach().transpose(1, 2) for t in expected[:3]], dim=-1).requires_grad_()
    slices = [part.transpose(1, 2) for part in fused.split(16, dim=-1)]
    output, _ = mlstm_triton(*slices, *(t.detach() for t in expected[3:]), chunk_size=16)
    output.sum().backward()
    torch.testing.assert_close(output, reference, rtol=0, atol=0)
    gradient = torch.cat([t.grad.transpose(1, 2) for t in expected[:3]], dim=-1)
    torch.testing.assert_close(fused.grad, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype):
    tensors, starts = make_inputs(1, 36, 1, 16, 16, seed=19, document_rate=0.05)
    # The narrow output and the narrow gradients are rounded to 8 or 11 bits; arithmetic is fp32 or better on
    # a GPU. Gradients of gates are sums of terms that cancel.
    compare(tensors, starts, chunk_size=16, dtype=dtype, tolerance=4e-2 if dtype == torch.bfloat16 else 1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 48}, "power of two"),
        ({"chunk_size": 8}, "from 16"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    tensors, _ = make_inputs(1, 4, 1, 16, 16)
    inputs = [tensor.to(device(), change.get("dtype", torch.float32)) for tensor in tensors[:5]]
    with pytest.raises(ValueError, match=message):
        mlstm_triton(*inputs, chunk_size=change.get("chunk_size", 16))


@pytest.mark.gpu
def test_7b_heads_in_bf16_on_a_gpu():
    tensors, starts = make_inputs(1, 300, 2, 256, 512, seed=23, document_rate=0.01)
    tensors[4] = tensors[4] + 4.0
    # bf16 tiles round scores and states to 8 bits before each matrix product.
    compare(tensors, starts, chunk_size=64, dtype=torch.bfloat16, tolerance=5e-2)
