"""What the tests of both fast forms of the causal convolution share."""

import torch

from kernels.conv1d import causal_conv1d

# Sums of at most a few hundred fp32 terms, beside the largest value.
TOLERANCE = 1e-5


def make_inputs(sizes, *, seed=0, document_rate=0.0):
    """Float64 inputs, weight, bias and state, and document starts or None; sizes: batch, sequence, channels, width."""
    batch, sequence, channels, width = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, sequence, channels), (channels, width), (channels,), (batch, width - 1, channels))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    starts = torch.rand(batch, sequence, generator=generator) < document_rate if document_rate else None
    return tensors, starts


def run(
    function, tensors, starts, dtype, *, with_bias=True, with_state=True, upstream=(1.0, 1.0), where="cpu", **options
):
    """Outputs and final state, and gradients of a random linear functional of them, as float64 on the CPU."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [tensor.to(where, dtype if i == 0 else kept).requires_grad_() for i, tensor in enumerate(tensors)]
    inputs, weight, bias, state = leaves
    results = function(
        inputs,
        weight,
        bias if with_bias else None,
        initial_state=state if with_state else None,
        document_starts=None if starts is None else starts.to(where),
        **options,
    )
    generator = torch.Generator().manual_seed(99)
    loss = 0.0
    for result, factor in zip(results, upstream, strict=True):
        direction = torch.randn(result.shape, generator=generator, dtype=torch.float64) * factor
        loss = loss + (result * direction.to(where, result.dtype)).sum()
    wanted = [inputs, weight] + [bias] * with_bias + [state] * with_state
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [x.detach().double().cpu() for x in results], [x.double().cpu() for x in gradients]


def assert_close(actual, expected, name, tolerance=TOLERANCE):
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    if expected.numel():
        error, scale = (actual - expected).abs().max(), expected.abs().max()
        assert error <= tolerance * scale + 1e-7, f"{name}: differs by {error:.1e} where the largest is {scale:.1e}"


def compare(
    *, sizes, activation, backend, seed=0, document_rate=0.0, dtype=torch.float32, tolerance=TOLERANCE, **run_options
):
    """A fast form in ``dtype`` against the loop in float64 on the same (rounded) inputs."""
    tensors, starts = make_inputs(sizes, seed=seed, document_rate=document_rate)
    tensors[0] = tensors[0].to(dtype).double()
    where = run_options.pop("where", "cpu")
    expected = run(
        causal_conv1d, tensors, starts, torch.float64, activation=activation, backend="reference", **run_options
    )
    actual = run(
        causal_conv1d, tensors, starts, dtype, activation=activation, backend=backend, where=where, **run_options
    )
    for name, a, e in zip(("outputs", "final state"), actual[0], expected[0], strict=True):
        assert_close(a, e, name, tolerance)
    for name, a, e in zip(("inputs", "weight", "bias or state", "state"), actual[1], expected[1], strict=False):
        assert_close(a, e, f"gradient of {name}", tolerance)
