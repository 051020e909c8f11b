"""The causal convolution's torch form against the float64 loop over tokens: values, states and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.conv1d import blocks_torch, causal_conv1d
from tests.kernels.conv1d_cases import assert_close, compare, make_inputs, run

CASES = {
    "usual": dict(sizes=(2, 37, 5, 4)),
    "usual, documents": dict(sizes=(3, 37, 5, 4), document_rate=0.2),
    "one token": dict(sizes=(2, 1, 3, 4)),
    "one token that begins a document": dict(sizes=(2, 1, 3, 4), document_rate=1.0),
    "shorter than the window": dict(sizes=(2, 2, 3, 8), document_rate=0.3),
    "as long as the window": dict(sizes=(1, 3, 3, 4)),
    "width 1": dict(sizes=(2, 9, 3, 1), document_rate=0.3),
    "width 2": dict(sizes=(2, 19, 4, 2), document_rate=0.3),
    "width 8": dict(sizes=(2, 41, 3, 8), document_rate=0.1),
    "documents of one token": dict(sizes=(2, 19, 3, 4), document_rate=1.0),
    "no bias": dict(sizes=(2, 19, 3, 4), with_bias=False, document_rate=0.1),
    "no state": dict(sizes=(2, 19, 3, 4), with_state=False, document_rate=0.1),
}


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("block", [1, 40, 10**6], ids=["smallest blocks", "small blocks", "one block"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_reference(case, block, activation, monkeypatch):
    monkeypatch.setattr(blocks_torch, "_BLOCK_ELEMENTS", block)
    compare(**case, activation=activation, backend="torch")


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 4), st.integers(1, 8)),
    document_rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(sizes, document_rate, seed):
    compare(sizes=sizes, document_rate=document_rate, seed=seed, activation="silu", backend="torch")


@pytest.mark.parametrize("only", [0, 1], ids=["outputs", "final state"])
def test_each_result_alone_gives_its_gradients(only):
    upstream = tuple(float(index == only) for index in range(2))
    compare(sizes=(2, 7, 3, 4), document_rate=0.2, upstream=upstream, activation="silu", backend="torch")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_documents_by_hand(backend):
    # Consecutive starts, one at the first token and one at the last.
    inputs = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])[None, :, None]
    weight, state = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[[0.1], [0.2]]])
    for starts, expected, last in (
        ([0, 0, 0, 0, 0], [1.3, 11.2, 111, 1110, 11100], [1000, 10000]),
        ([1, 0, 0, 0, 0], [1, 11, 111, 1110, 11100], [1000, 10000]),
        ([0, 1, 1, 0, 0], [1.3, 10, 100, 1100, 11100], [1000, 10000]),
        ([0, 0, 0, 0, 1], [1.3, 11.2, 111, 1110, 10000], [0, 10000]),
    ):
        flags = torch.tensor(starts, dtype=torch.bool)[None]
        outputs, final = causal_conv1d(inputs, weight, initial_state=state, document_starts=flags, backend=backend)
        torch.testing.assert_close(outputs[0, :, 0], torch.tensor(expected, dtype=torch.float32))
        torch.testing.assert_close(final[0, :, 0], torch.tensor(last, dtype=torch.float32))


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_nothing_leaks_from_the_document_before(activation):
    tensors, starts = make_inputs((1, 12, 3, 4), document_rate=1.0)
    starts[:] = False
    starts[0, 6] = True
    inputs = tensors[0].float()
    inputs[0, :6] *= 1e30
    inputs.requires_grad_()
    outputs, final = causal_conv1d(
        inputs, tensors[1].float(), tensors[2].float(), document_starts=starts, activation=activation, backend="torch"
    )
    alone, last = causal_conv1d(
        inputs[:, 6:], tensors[1].float(), tensors[2].float(), activation=activation, backend="torch"
    )
    torch.testing.assert_close(outputs[:, 6:], alone)
    assert torch.equal(final, last)
    (gradient,) = torch.autograd.grad(outputs[:, 6:].sum() + final.sum(), inputs)
    assert (gradient[:, :6] == 0).all() and gradient[:, 6:].isfinite().all()


def test_segments_joined_are_one_pass():
    tensors, starts = make_inputs((2, 23, 3, 4), document_rate=0.1, seed=4)

    def joined(inputs, weight, bias, *, initial_state, document_starts, **options):
        outputs, state = [], initial_state
        for part in (slice(0, 9), slice(9, 10), slice(10, 12), slice(12, 23)):
            piece, state = causal_conv1d(
                inputs[:, part], weight, bias, initial_state=state, document_starts=document_starts[:, part], **options
            )
            outputs.append(piece)
        return torch.cat(outputs, dim=1), state

    options = {"activation": "silu", "backend": "torch"}
    one = run(causal_conv1d, tensors, starts, torch.float32, **options)
    two = run(joined, tensors, starts, torch.float32, **options)
    for index, (actual, expected) in enumerate(zip([*two[0], *two[1]], [*one[0], *one[1]], strict=True)):
        assert_close(actual, expected, f"result {index}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["batch first", "sequence first"])
def test_memory_layout_is_that_of_the_inputs(order, dtype):
    generator = torch.Generator().manual_seed(3)
    sizes = (2, 9)
    fused = torch.randn(*(sizes[index] for index in order), 8, generator=generator).to(dtype).requires_grad_()
    # The middle channels of a fused projection.
    inputs = fused[..., 2:5].permute(*order, 2)
    weight = torch.randn(3, 4, generator=generator)
    outputs, state = causal_conv1d(inputs, weight, activation="silu", backend="torch")
    assert outputs.permute(*order, 2).is_contiguous() and outputs.dtype == dtype
    assert state.is_contiguous() and state.dtype == torch.float32
    dense = inputs.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    expected, _ = causal_conv1d(dense, weight, activation="silu", backend="torch")
    # Vectorised and scalar forms of one function differ in the last bit.
    options = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(outputs, expected, **options)
    direction = torch.randn(outputs.shape, generator=generator).to(dtype)
    gradient, expected_gradient = (
        torch.autograd.grad((result * direction).sum(), leaf)[0]
        for result, leaf in ((outputs, fused), (expected, dense))
    )
    torch.testing.assert_close(gradient[..., 2:5].permute(*order, 2), expected_gradient, **options)


def test_expanded_gradients_are_taken():
    tensors, _ = make_inputs((2, 9, 3, 4))
    inputs = tensors[0].float().requires_grad_()
    for activation in ("none", "silu"):
        outputs, _ = causal_conv1d(inputs, tensors[1].float(), activation=activation, backend="torch")
        (expanded,) = torch.autograd.grad(outputs.sum(), inputs, retain_graph=True)
        (dense,) = torch.autograd.grad(outputs, inputs, torch.ones_like(outputs))
        torch.testing.assert_close(expanded, dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype):
    # Outputs and gradients of inputs are rounded to 8 or 11 bits; everything between is float32.
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-3
    compare(
        sizes=(2, 30, 4, 4), document_rate=0.1, dtype=dtype, tolerance=tolerance, activation="silu", backend="torch"
    )


def test_auto_is_the_torch_form_on_a_cpu():
    tensors, starts = make_inputs((2, 9, 3, 4), document_rate=0.2)
    results = [
        causal_conv1d(*(t.float() for t in tensors[:3]), document_starts=starts, backend=backend)[0]
        for backend in ("auto", "torch")
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(2, 0, 3)}, "inputs must be"),
        ({"inputs": torch.zeros(2, 3)}, "inputs must be"),
        ({"inputs": torch.zeros(2, 5, 3, dtype=torch.int64)}, "floating point"),
        ({"weight": torch.zeros(4, 4)}, r"weight must be \(3, width\)"),
        ({"weight": torch.zeros(3, 0)}, r"weight must be \(3, width\)"),
        ({"bias": torch.zeros(4)}, r"bias must be \(3,\)"),
        ({"initial_state": torch.zeros(2, 4, 3)}, r"initial_state must be \(2, 3, 3\)"),
        ({"document_starts": torch.zeros(2, 4, dtype=torch.bool)}, r"document_starts must be \(2, 5\)"),
        ({"document_starts": torch.zeros(2, 5)}, "document_starts must be bool"),
        ({"activation": "relu"}, "activation must be one of none, silu"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"inputs": torch.zeros(2, 5, 3), "weight": torch.zeros(3, 4)} | change
    inputs, weight = arguments.pop("inputs"), arguments.pop("weight")
    with pytest.raises(ValueError, match=message):
        causal_conv1d(inputs, weight, **arguments)
