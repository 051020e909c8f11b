"""The Triton sLSTM against the float64 loop over tokens: values, states and every gradient.

Without a GPU the kernels run in Triton's interpreter, which computes fp32 exactly as written.
"""

from __future__ import annotations

import pytest
import torch

from kernels.launch import interpreter_is_active
from kernels.slstm import slstm
from kernels.slstm.compiled import launches
from tests.kernels.slstm_cases import assert_close, random_inputs, random_starts, values_and_gradients


@pytest.fixture(autouse=True)
def kernels_can_run() -> None:
    if not interpreter_is_active() and not torch.cuda.is_available():
        pytest.fail("Triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1.")


def device() -> str:
    return "cpu" if interpreter_is_active() else "cuda"


def compare(sizes, kind, *, dtype=torch.float32, tolerance=1e-5, seed=0, gate_scale=2.0, shift=0.0, **options) -> None:
    inputs = random_inputs(*sizes, seed=seed, gate_scale=gate_scale)
    # Closed inputs that are remembered, so that the initial stabilizer and early tokens set the final one too.
    inputs[0][:, :, 0] -= shift
    inputs[0][:, :, 1] += shift
    inputs = [inputs[0].to(dtype).double(), *(tensor.float().double() for tensor in inputs[1:])]
    starts = random_starts(kind, *sizes[:2])
    expected = values_and_gradients(inputs, starts, "reference", **options)
    actual = values_and_gradients(inputs, starts, "triton", dtype=dtype, device=device(), **options)
    assert_close(actual, expected, tolerance)


# batch, sequence, heads, head size: whole and ragged tiles, one tile (resident) and several (tiled).
SIZES = {
    "one token": (1, 1, 1, 16),
    "channels below a tile": (3, 9, 2, 5),
    "one whole tile": (2, 7, 1, 32),
    "more sequences than one program takes": (18, 4, 2, 3),
    "several tiles": (2, 5, 2, 40),
    "several whole tiles": (17, 3, 1, 64),
}


@pytest.mark.parametrize("kind", ["unset", "consecutive"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_equals_reference(sizes: tuple[int, ...], kind: str) -> None:
    compare(sizes, kind)


@pytest.mark.parametrize("size", [6, 40])
@pytest.mark.parametrize("kind", ["none", "first", "random"])
def test_documents(kind: str, size: int) -> None:
    compare((3, 8, 2, size), kind, seed=1)


@pytest.mark.parametrize("size", [6, 40])
def test_from_the_zero_state(size: int) -> None:
    compare((2, 5, 2, size), "unset", with_state=False)


@pytest.mark.parametrize("only", range(5), ids=["hidden", "final_hidden", "cell", "normalizer", "stabilizer"])
@pytest.mark.parametrize("size", [6, 36])
def test_each_result_alone_gives_its_gradients(only: int, size: int) -> None:
    compare((2, 6, 1, size), "unset", seed=2, shift=3.0, upstream=[float(index == only) for index in range(5)])


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_wide_gates(shift: float) -> None:
    # Gates of size 30 have float32 steps of 2e-6, and enter exponentials.
    compare((2, 9, 1, 7), "random", seed=3, gate_scale=5.0, shift=shift, tolerance=4e-5)


def test_a_long_memory_keeps_its_precision() -> None:
    """Forget gates near 1, whose logarithm is a small difference: its error would add up over the tokens."""
    inputs = random_inputs(1, 120, 1, 4, gate_scale=1.0)
    inputs[0][:, :, 1] += 11.0
    inputs = [tensor.float().double() for tensor in inputs]
    expected = values_and_gradients(inputs, None, "reference")
    assert_close(values_and_gradients(inputs, None, "triton", dtype=torch.float32, device=device()), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gates(dtype: torch.dtype) -> None:
    # Hidden states and the gates' gradients are rounded to 8 or 11 bits, also where they feed back.
    compare((2, 9, 2, 6), "random", dtype=dtype, gate_scale=1.0, tolerance=6e-2 if dtype == torch.bfloat16 else 1e-2)


def test_strided_gates_and_expanded_gradients() -> None:
    inputs = [tensor.float().to(device()) for tensor in random_inputs(2, 6, 2, 5)[:3]]
    expected = inputs[0].clone().requires_grad_()
    hidden, _ = slstm(expected, *inputs[1:], backend="triton")
    hidden.sum().backward()
    for order in ((3, 1, 0, 2, 4), (4, 0, 1, 2, 3)):
        back = sorted(range(5), key=order.__getitem__)
        strided = inputs[0].permute(order).contiguous().permute(back).requires_grad_()
        other, _ = slstm(strided, *inputs[1:], backend="triton")
        other.sum().backward()
        torch.testing.assert_close(other, hidden, rtol=0, atol=0)
        torch.testing.assert_close(strided.grad, expected.grad, rtol=0, atol=0)


def test_gradients_can_be_taken_twice_from_one_graph() -> None:
    leaves = [tensor.float().to(device()).requires_grad_() for tensor in random_inputs(1, 4, 1, 5)[:3]]
    hidden, final = slstm(*leaves, backend="triton")
    loss = hidden.square().sum() + final.stabilizer.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for gradient, again in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(gradient, again)


def test_float64_is_refused() -> None:
    inputs = [tensor.to(device()) for tensor in random_inputs(1, 2, 1, 4)[:3]]
    with pytest.raises(ValueError, match="float64"):
        slstm(*inputs, backend="triton")


def test_launches_cover_both_kernels_of_both_passes() -> None:
    names = [launch.kernel.__name__ for launch in launches()]
    expected = {f"slstm_{way}_{form}_kernel" for way in ("forward", "backward") for form in ("resident", "tiled")}
    assert set(names) == expected and len(names) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 512])
def test_published_heads_in_bf16_on_a_gpu(size: int) -> None:
    # Hidden states, weights and gradients are rounded to 8 bits where they feed back. The final cell, normalizer and
    # stabilizer give no gradients here: all are measured from a maximum, and rounding decides which of two nearly equal
    # tokens it came from, to which that gradient goes whole.
    upstream = (1, 1, 0, 0, 0)
    compare((3, 64, 2, size), "random", dtype=torch.bfloat16, gate_scale=1.0, tolerance=8e-2, upstream=upstream)
