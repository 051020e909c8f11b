"""The launches of the affine scan: which kernel runs on which grid, and their connection to autograd."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.affine_scan import triton_blocks, triton_diagonal, triton_pairs
from kernels.affine_scan.arguments import compute_dtype, restarts
from kernels.launch import Executor, Launch, check_device, execute

# Components per channel -> tokens and channels of a program's tile, and its warps; 0 is any other number. Fixed
# rather than tuned at run time, and never keyed on the sequence length. A row of 32 channels is one cache line of
# fp32 or half a line of bf16.
TILES = {1: (64, 32, 4), 2: (32, 32, 4), 0: (1, 32, 4)}
KERNELS = {
    1: (triton_diagonal.affine_scan_diagonal_kernel, triton_diagonal.affine_scan_diagonal_backward_kernel),
    2: (triton_pairs.affine_scan_pairs_kernel, triton_pairs.affine_scan_pairs_backward_kernel),
    0: (triton_blocks.affine_scan_blocks_kernel, triton_blocks.affine_scan_blocks_backward_kernel),
}


def _launch(direction: int, arguments: dict[str, Any], inputs_shape: torch.Size, reverse: bool) -> Launch:
    """The forward (0) or backward (1) kernel for states shaped (batch, sequence, [components,] channels)."""
    batch, sequence, *components, channels = inputs_shape
    count = components[0] if components else 1
    kind = count if count in TILES else 0
    block_time, block_channels, num_warps = TILES[kind]
    constants: dict[str, Any] = {
        "HAS_CUTS": arguments["cuts"] is not arguments["initial"],
        "REVERSE": reverse,
        "BLOCK_CHANNELS": block_channels,
    }
    if kind == 0:
        constants |= {"COMPONENTS": count, "BLOCK_COMPONENTS": triton.next_power_of_2(count)}
    else:
        constants["BLOCK_TIME"] = block_time
    sizes = {"sequence": sequence, "channels": channels}
    grid = (triton.cdiv(channels, block_channels), batch)
    return Launch(KERNELS[kind][direction], grid, arguments | sizes, constants, num_warps)


def affine_scan_forward(
    coefficients: Tensor, inputs: Tensor, initial: Tensor, cuts: Tensor | None, reverse: bool,
    launch: Executor = execute,
) -> Tensor:  # fmt: skip
    """The states, in the dtype of ``inputs``; contiguous tensors, ``initial`` in fp32."""
    states = torch.empty_like(inputs)
    arguments = {
        "coefficients": coefficients, "inputs": inputs, "initial": initial,
        "cuts": initial if cuts is None else cuts, "states": states,
    }  # fmt: skip
    launch(_launch(0, arguments, inputs.shape, reverse))
    return states


def affine_scan_backward(
    coefficients: Tensor, states: Tensor, initial: Tensor, cuts: Tensor | None, gradient: Tensor, reverse: bool,
    launch: Executor = execute,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the coefficients, the inputs and the initial state; contiguous tensors."""
    results = torch.empty_like(coefficients), torch.empty_like(states), torch.empty_like(initial)
    arguments = {
        "coefficients": coefficients, "states": states, "initial": initial,
        "cuts": initial if cuts is None else cuts, "gradient": gradient,
        "coefficients_gradient": results[0], "inputs_gradient": results[1], "initial_gradient": results[2],
    }  # fmt: skip
    launch(_launch(1, arguments, states.shape, reverse))
    return results


class _AffineScanTriton(torch.autograd.Function):
    """Connects the launches to autograd; keeps the coefficients and the states as they were returned."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, inputs: Tensor, initial: Tensor, cuts: Tensor | None, reverse: bool
    ) -> Tensor:
        coefficients = coefficients.contiguous()
        states = affine_scan_forward(coefficients, inputs.contiguous(), initial, cuts, reverse)
        ctx.save_for_backward(coefficients, states, initial, cuts)
        ctx.reverse = reverse
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = affine_scan_backward(*ctx.saved_tensors, gradient.contiguous(), ctx.reverse)
        return *gradients, None, None


def affine_scan_triton(
    coefficients: Tensor, inputs: Tensor, initial: Tensor | None, document_starts: Tensor | None, reverse: bool
) -> Tensor:
    """The Triton form; shapes and meaning as in ``kernels.affine_scan.affine_scan``.

    Raises:
        ValueError: for float64, or tensors on a CPU without Triton's interpreter.
    """
    if compute_dtype(coefficients, inputs, initial) == torch.float64:
        raise ValueError("affine_scan: the Triton form has no float64; use the torch form.")
    check_device(inputs, "affine_scan: inputs")
    if initial is None:
        initial = torch.zeros((inputs.shape[0], *inputs.shape[2:]), device=inputs.device)
    cuts = restarts(document_starts, reverse)
    cuts = None if cuts is None else cuts.contiguous()
    return _AffineScanTriton.apply(coefficients, inputs, initial.float().contiguous(), cuts, reverse)
