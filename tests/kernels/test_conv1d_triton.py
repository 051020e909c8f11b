"""The causal convolution's Triton form against the float64 loop over tokens: values, states and every gradient.

Without a GPU the kernels run in Triton's interpreter, which computes fp32 exactly as written.
"""

import pytest
import torch

from kernels.conv1d import causal_conv1d, tiles_triton
from kernels.launch import interpreter_is_active
from tests.kernels.conv1d_cases import compare, make_inputs, run

CASES = {
    "one tile": dict(sizes=(2, 7, 5, 4)),
    "several tiles": dict(sizes=(1, 41, 20, 4)),
    "documents": dict(sizes=(2, 25, 18, 4), document_rate=0.2),
    "rare documents": dict(sizes=(2, 25, 5, 4), document_rate=0.04),
    "documents of one token": dict(sizes=(1, 19, 5, 4), document_rate=1.0),
    "whole tiles": dict(sizes=(1, 32, 16, 4), document_rate=0.1),
    "one token": dict(sizes=(2, 1, 3, 4)),
    "one token that begins a document": dict(sizes=(2, 1, 3, 4), document_rate=1.0),
    "shorter than the window": dict(sizes=(2, 2, 3, 8), document_rate=0.3),
    "as long as the window": dict(sizes=(1, 3, 3, 4)),
    "the last tile holds the window's end alone": dict(sizes=(1, 15, 3, 4)),
    "width 1": dict(sizes=(2, 9, 3, 1), document_rate=0.3),
    "width 2": dict(sizes=(2, 19, 4, 2), document_rate=0.3),
    "width 8": dict(sizes=(1, 25, 3, 8), document_rate=0.1),
    "no bias": dict(sizes=(2, 19, 3, 4), with_bias=False, document_rate=0.1),
    "no state": dict(sizes=(2, 19, 3, 4), with_state=False, document_rate=0.1),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    if not interpreter_is_active() and not torch.cuda.is_available():
        pytest.fail("Triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1.")
    for name, size in {"BLOCK_TOKENS": 8, "BLOCK_CHANNELS": 16, "TILES": 2}.items():
        monkeypatch.setattr(tiles_triton, name, size)


def device():
    return "cpu" if interpreter_is_active() else "cuda"


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_reference(case, activation):
    compare(**case, activation=activation, backend="triton", where=device())


@pytest.mark.parametrize("only", [0, 1], ids=["outputs", "final state"])
def test_each_result_alone_gives_its_gradients(only):
    upstream = tuple(float(index == only) for index in range(2))
    compare(
        sizes=(2, 17, 3, 4), document_rate=0.2, upstream=upstream, activation="silu", backend="triton", where=device()
    )


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

    options = {"activation": "silu", "backend": "triton", "where": device()}
    one = run(causal_conv1d, tensors, starts, torch.float32, **options)
    two = run(joined, tensors, starts, torch.float32, **options)
    for actual, expected in zip([*two[0], *two[1]], [*one[0], *one[1]], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_memory_layout_is_that_of_the_inputs(order, activation):
    generator = torch.Generator().manual_seed(3)
    sizes = (2, 19)
    fused = torch.randn(*(sizes[index] for index in order), 8, generator=generator).to(device()).requires_grad_()
    # The middle channels of a fused projection.
    inputs = fused[..., 2:5].permute(*order, 2)
    weight = torch.randn(3, 4, generator=generator).to(device())
    outputs, state = causal_conv1d(inputs, weight, activation=activation, backend="triton")
    assert outputs.permute(*order, 2).is_contiguous() and state.is_contiguous()
    expected, _ = causal_conv1d(inputs, weight, activation=activation, backend="torch")
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    # An expanded gradient, and one whose channels are not contiguous.
    scattered = torch.randn(3, 2, 19, generator=generator).to(device()).permute(1, 2, 0)
    for direction in (torch.ones((), device=device()).expand(2, 19, 3), scattered):
        (gradient,) = torch.autograd.grad(outputs, fused, direction, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad(expected, fused, direction, retain_graph=True)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_inputs_with_scattered_channels_are_taken():
    inputs = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(1)).to(device()).permute(1, 2, 0)
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)).to(device())
    outputs, _ = causal_conv1d(inputs, weight, backend="triton")
    expected, _ = causal_conv1d(inputs, weight, backend="torch")
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nothing_leaks_from_the_document_before():
    tensors, starts = make_inputs((1, 12, 3, 4), document_rate=1.0)
    starts[:] = False
    starts[0, 6] = True
    inputs, weight, starts = tensors[0].float().to(device()), tensors[1].float().to(device()), starts.to(device())
    inputs[:, :6] = torch.inf
    outputs, final = causal_conv1d(inputs, weight, document_starts=starts, activation="silu", backend="triton")
    alone, last = causal_conv1d(inputs[:, 6:], weight, activation="silu", backend="triton")
    assert torch.equal(outputs[:, 6:], alone) and torch.equal(final, last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype):
    # Outputs and gradients of inputs are rounded to 8 or 11 bits; everything between is float32.
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-3
    compare(
        sizes=(2, 30, 4, 4), document_rate=0.1, dtype=dtype, tolerance=tolerance, activation="silu",
        backend="triton", where=device(),
    )  # fmt: skip


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        causal_conv1d(
            torch.ones(1, 3, 2, dtype=torch.float64, device=device()),
            torch.ones(2, 4, device=device()),
            backend="triton",
        )


@pytest.mark.gpu
def test_whole_tiles_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
        compare(
            sizes=(2, 700, 200, 4), document_rate=0.01, dtype=dtype, tolerance=tolerance, activation="silu",
            backend="triton", where="cuda",
        )  # fmt: skip
