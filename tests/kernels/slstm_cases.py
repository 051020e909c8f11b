"""Random inputs of the sLSTM, and its values and gradients by name, for the tests of all its forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.slstm import SLSTMState, slstm

RESULTS = ("hidden", "final hidden", "final cell", "final normalizer", "final stabilizer")
INPUTS = ("gates", "recurrent", "bias", "initial hidden", "initial cell", "initial normalizer", "initial stabilizer")


def random_inputs(
    batch: int, sequence: int, heads: int, size: int, *, seed: int = 0, gate_scale: float = 2.0, recurrence: float = 0.8
) -> list[Tensor]:
    """Float64 tensors in the order of ``INPUTS``; the state is one that tokens can leave behind."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = (batch, heads, size)
    normalizer = 0.5 + normal(*state).abs()
    return [
        gate_scale * normal(batch, sequence, 4, heads, size),
        recurrence * size**-0.5 * normal(4, heads, size, size),
        normal(4, heads, size),
        normal(*state),
        normalizer * torch.tanh(normal(*state)),
        normalizer,
        2 * normal(*state),
    ]


def random_starts(kind: str, batch: int, sequence: int) -> Tensor | None:
    """Where documents begin, for each kind that a packed batch can show."""
    if kind == "unset":
        return None
    starts = torch.zeros(batch, sequence, dtype=torch.bool)
    if kind == "random":
        starts = torch.rand(batch, sequence, generator=torch.Generator().manual_seed(sequence)) < 0.15
    elif kind == "first":
        starts[0, 0] = True
    elif kind == "consecutive":
        starts[0, sequence // 2 : sequence // 2 + 3] = True
        starts[-1, -1] = True
    return starts


def values_and_gradients(
    inputs: Sequence[Tensor],
    starts: Tensor | None,
    backend: str,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    with_state: bool = True,
    upstream: Sequence[float] = (1, 1, 1, 1, 1),
) -> dict[str, Tensor]:
    """Results, and gradients of a random linear function of them, as float64 on the CPU.

    Args:
        dtype: of the gates; the other inputs are float32 at least.
        upstream: factor of each result in that function.
    """
    wider = torch.promote_types(dtype, torch.float32)
    leaves = [tensor.to(device, wider if index else dtype).requires_grad_() for index, tensor in enumerate(inputs)]
    leaves = leaves if with_state else leaves[:3]
    hidden, final = slstm(
        *leaves[:3],
        initial_state=SLSTMState(*leaves[3:]) if with_state else None,
        document_starts=None if starts is None else starts.to(device),
        backend=backend,
    )
    results = [hidden, *final]
    assert hidden.dtype == dtype and all(tensor.dtype == wider for tensor in final)
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for tensor, factor in zip(results, upstream, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        loss = loss + factor * (tensor.double() * direction.to(device)).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    named = zip(
        (*RESULTS, *(f"gradient of {name}" for name in INPUTS[: len(leaves)])), (*results, *gradients), strict=True
    )
    return {name: tensor.detach().double().cpu() for name, tensor in named}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Errors are relative to the largest entry of what is expected, but for gradients that cancel to nothing."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].isfinite().all(), f"{name} is not finite"
        error = (actual[name] - tensor).abs().max().item() / tensor.abs().max().clamp_min(1e-3).item()
        assert error <= tolerance, f"{name}: relative error {error:.2e} exceeds {tolerance:.0e}"
