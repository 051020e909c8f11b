"""The Triton affine scan against the float64 loop over tokens: states and every gradient.

Without a GPU the kernels run in Triton's interpreter, which computes fp32 exactly as written.
"""

import pytest
import torch

from kernels.affine_scan import affine_scan, triton_launches
from kernels.launch import interpreter_is_active

NAMES = ("states", "d_coefficients", "d_inputs", "d_initial")


@pytest.fixture(autouse=True)
def kernels_can_run():
    if not interpreter_is_active() and not torch.cuda.is_available():
        pytest.fail("Triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1.")


def device():
    return "cpu" if interpreter_is_active() else "cuda"


@pytest.fixture
def small_tiles(monkeypatch):
    """Few tokens per tile, so that short sequences have several tiles."""
    tiles = {1: (8, 4, 1), 2: (8, 4, 1), 0: (1, 4, 1)} if interpreter_is_active() else triton_launches.TILES
    monkeypatch.setattr(triton_launches, "TILES", tiles)


def make_inputs(batch, sequence, components, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    state = (channels,) if components is None else (components, channels)
    matrix = state if components is None else (components, *state)
    shapes = ((batch, sequence, *matrix), (batch, sequence, *state), (batch, *state), (batch, sequence, *state))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [0.7 * tensors[0] / (components or 1) ** 0.5, *tensors[1:3]], tensors[3]


def results(inputs, cotangent, dtype, where, starts, **options):
    leaves = [tensor.to(where, dtype).requires_grad_() for tensor in inputs]
    starts = None if starts is None else starts.to(where)
    states = affine_scan(leaves[0], leaves[1], initial=leaves[2], document_starts=starts, **options)
    gradients = torch.autograd.grad((states * cotangent.to(where, dtype)).sum(), leaves)
    return [tensor.detach().double().cpu() for tensor in (states, *gradients)]


def compare(inputs, cotangent, starts, **options):
    expected = results(inputs, cotangent, torch.float64, "cpu", starts, backend="reference", **options)
    actual = results(inputs, cotangent, torch.float32, device(), starts, backend="triton", **options)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.isfinite().all(), name
        error = (a - e).abs().max().item()
        assert error <= 1e-5 * max(e.abs().max().item(), 1e-3), f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", ["unset", "random", "edges", "consecutive"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("components", [None, 2, 3])
def test_equals_reference(small_tiles, components, reverse, kind):
    for sequence, channels in ((1, 3), (16, 4), (19, 5)):
        inputs, cotangent = make_inputs(2, sequence, components, channels, seed=sequence)
        starts = torch.zeros(2, sequence, dtype=torch.bool)
        if kind == "random":
            starts = torch.rand(2, sequence, generator=torch.Generator().manual_seed(1)) < 0.2
        elif kind == "edges":
            starts[0, 0] = starts[1, -1] = True
        elif kind == "consecutive":
            starts[:, sequence // 2 : sequence // 2 + 3] = True
        compare(inputs, cotangent, None if kind == "unset" else starts, reverse=reverse)


@pytest.mark.parametrize("components", [None, 1, 2, 5])
def test_the_tiles_that_gpus_run(components):
    inputs, cotangent = make_inputs(1, 70, components, 3, seed=5)
    starts = torch.rand(1, 70, generator=torch.Generator().manual_seed(2)) < 0.05
    compare(inputs, cotangent, starts)


def test_strided_inputs_and_expanded_gradients(small_tiles):
    inputs, _ = make_inputs(2, 12, None, 4, seed=7)
    gradients = []
    for strided in (False, True):
        leaves = [tensor.float().to(device()) for tensor in inputs[:2]]
        if strided:
            leaves = [leaf.transpose(0, 2).contiguous().transpose(0, 2) for leaf in leaves]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        affine_scan(*leaves, backend="triton").sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_narrow_inputs(small_tiles):
    """fp16 is loaded, computed in fp32 and rounded once."""
    inputs, _ = make_inputs(1, 20, 2, 4, seed=9)
    narrow = [tensor.half().to(device()) for tensor in inputs[:2]]
    actual = affine_scan(*narrow, backend="triton")
    assert actual.dtype == torch.float16
    expected = affine_scan(*(tensor.double() for tensor in narrow), backend="reference")
    torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=1e-4)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        affine_scan(*(torch.zeros(1, 2, 3, dtype=torch.float64) for _ in range(2)), backend="triton")
