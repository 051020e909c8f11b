"""The affine scan in vectorised torch: two levels of short loops instead of one loop over all tokens.

The sequence is cut into chunks that advance together, one token of every chunk per step. The first pass finds
each chunk's affine map without writing anything per token; a loop over chunks then gives the state before each
chunk; the second pass runs from those states. That reads the coefficients and inputs twice and writes the
states once, whatever the length, where a scan by doubling makes log2(sequence) passes over all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.affine_scan.arguments import compute_dtype, restarts

# Elements of a state, over batch, components and channels, from which one step of the plain loop computes for
# longer than it takes to dispatch, so that a second pass no longer pays. Measured on one core.
WIDE_STATE = 8192


def chunk_count(sequence: int, width: int) -> int:
    """How many chunks advance together: 3 sequence / chunks + 2 chunks operations are fewest at this number."""
    if width >= WIDE_STATE or sequence < 16:
        return 1
    return max(1, round((1.5 * sequence) ** 0.5))


def _advance(matrix: Tensor, state: Tensor, result: Tensor) -> Tensor:
    """result += matrix state, for (..., K, K, D) and (..., K, D), or elementwise for equal shapes."""
    if matrix.dim() == state.dim():
        return result.addcmul_(matrix, state)
    for component in range(state.shape[-2]):
        result.addcmul_(matrix[..., component, :], state[..., component : component + 1, :])
    return result


def _compose(matrix: Tensor, product: Tensor) -> Tensor:
    """matrix product, for (..., K, K, D) or elementwise; diagonal products are updated in place."""
    if matrix.dim() == 3:
        return product.mul_(matrix)
    result = matrix[..., :, 0, None, :] * product[..., 0, None, :, :]
    for component in range(1, matrix.shape[-2]):
        result.addcmul_(matrix[..., :, component, None, :], product[..., component, None, :, :])
    return result


def _run(coefficients: list[Tensor], inputs: list[Tensor], state: Tensor | None, results: list[Tensor]) -> None:
    """The plain loop over steps, each result written where it belongs."""
    for matrix, value, result in zip(coefficients, inputs, results, strict=True):
        if state is None:
            result.copy_(value)
        elif matrix.dim() == value.dim():
            torch.addcmul(value, matrix, state, out=result)
        else:
            torch.addcmul(value, matrix[..., 0, :], state[..., :1, :], out=result)
            for component in range(1, state.shape[-2]):
                result.addcmul_(matrix[..., component, :], state[..., component : component + 1, :])
        state = result


def solve(
    coefficients: Tensor, inputs: Tensor, initial: Tensor | None, reverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """The states of the scan, outside autograd and with no documents: zero coefficients separate them.

    Args:
        coefficients, inputs, initial: as for ``affine_scan``, all of one dtype, float32 or float64.
        reverse: from the last token to the first.
        out: where to write the states, of the shape of ``inputs`` and any strides; must not overlap anything.

    Returns:
        ``out``, or a new contiguous tensor.
    """
    batch, sequence = inputs.shape[:2]
    states = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device) if out is None else out
    chunks = chunk_count(sequence, inputs[:, 0].numel())
    length = sequence // chunks
    body = chunks * length
    # The few tokens that fill no chunk are the last of the scan.
    main, rest = (slice(sequence - body, None), slice(sequence - body)) if reverse else (slice(body), slice(body, None))
    direction = -1 if reverse else 1
    if chunks == 1:
        lists = [list(tensor.unbind(1))[::direction] for tensor in (coefficients, inputs, states)]
        _run(lists[0], lists[1], initial, lists[2])
        return states
    steps, values, results = (
        list(tensor[:, main].unflatten(1, (chunks, length)).unbind(2))[::direction]
        for tensor in (coefficients, inputs, states)
    )
    product, state = steps[0].contiguous().clone(), values[0].contiguous().clone()
    for matrix, value in zip(steps[1:], values[1:], strict=True):
        if matrix.dim() == 3:
            torch.addcmul(value, matrix, state, out=state)
        else:
            state = _advance(matrix, state, value.clone())
        product = _compose(matrix, product)
    boundaries = torch.empty_like(state)
    carried = torch.zeros_like(state[:, 0]) if initial is None else initial
    before, maps, ends = (list(tensor.unbind(1))[::direction] for tensor in (boundaries, product, state))
    for slot, matrix, end in zip(before, maps, ends, strict=True):
        slot.copy_(carried)
        carried = _advance(matrix, carried, end)
    _run(steps, values, boundaries, results)
    if body < sequence:
        lists = [list(tensor[:, rest].unbind(1))[::direction] for tensor in (coefficients, inputs, states)]
        last = states[:, sequence - body] if reverse else states[:, body - 1]
        _run(lists[0], lists[1], last, lists[2])
    return states


def cut(coefficients: Tensor, cuts: Tensor | None) -> Tensor:
    """The coefficients, exactly zero where ``cuts`` (batch, sequence) says."""
    if cuts is None:
        return coefficients
    return coefficients.masked_fill(cuts.view(*cuts.shape, *[1] * (coefficients.dim() - 2)), 0.0)


def adjoint(
    coefficients: Tensor, gradient: Tensor, carried: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The gradient of a loss with respect to every state, all later states taken into account.

    l_t = dL/dh_t + A_{t+1}^T l_{t+1}: the scan the other way, with transposed coefficients shifted by a token.

    Args:
        coefficients: as the scan used them, zero where documents are cut.
        gradient: dL/dh_t from outside the scan, shaped as the states.
        carried: what arrives at the last token's state from after the sequence, A^T l of the next token.
        reverse: the direction of the scan whose adjoint this is.

    Returns:
        l, and A^T l of the first token: the gradient of the state before it.
    """
    transposed = coefficients.transpose(2, 3) if coefficients.dim() == 5 else coefficients
    first, last = (-1, 0) if reverse else (0, -1)
    later, earlier = (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    result = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    result[:, last] = gradient[:, last] if carried is None else gradient[:, last] + carried
    if gradient.shape[1] > 1:
        solve(transposed[:, later], gradient[:, earlier], result[:, last], not reverse, result[:, earlier])
    before = _advance(transposed[:, first], result[:, first], torch.zeros_like(result[:, first]))
    return result, before


class _AffineScan(torch.autograd.Function):
    """Connects ``solve`` and ``adjoint`` to autograd; keeps the coefficients and the states."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, inputs: Tensor, initial: Tensor | None, cuts: Tensor | None, reverse: bool
    ) -> Tensor:
        states = solve(cut(coefficients, cuts), inputs, initial, reverse)
        ctx.save_for_backward(coefficients, states, initial, cuts)
        ctx.reverse = reverse
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, states, initial, cuts = ctx.saved_tensors
        inputs_gradient, initial_gradient = adjoint(cut(coefficients, cuts), gradient, None, ctx.reverse)
        coefficients_gradient = None
        if ctx.needs_input_grad[0]:
            coefficients_gradient = torch.empty(coefficients.shape, dtype=states.dtype, device=states.device)
            first = -1 if ctx.reverse else 0
            later, earlier = slice(1, None), slice(None, -1)
            later, earlier = (earlier, later) if ctx.reverse else (later, earlier)
            left, right = (inputs_gradient, states)
            if coefficients.dim() == 5:
                left, right = left.unsqueeze(3), right.unsqueeze(2)
            torch.mul(left[:, later], right[:, earlier], out=coefficients_gradient[:, later])
            if initial is None:
                coefficients_gradient[:, first] = 0.0
            else:
                before = initial.unsqueeze(1) if coefficients.dim() == 5 else initial
                torch.mul(left[:, first], before, out=coefficients_gradient[:, first])
            if cuts is not None:
                shape = (*cuts.shape, *[1] * (coefficients.dim() - 2))
                coefficients_gradient.masked_fill_(cuts.view(shape), 0.0)
        initial_gradient = None if initial is None else initial_gradient
        return coefficients_gradient, inputs_gradient, initial_gradient, None, None


def affine_scan_two_level(
    coefficients: Tensor, inputs: Tensor, initial: Tensor | None, document_starts: Tensor | None, reverse: bool
) -> Tensor:
    """The vectorised form; shapes and meaning as in ``kernels.affine_scan.affine_scan``."""
    dtype = compute_dtype(coefficients, inputs, initial)
    states = _AffineScan.apply(
        coefficients.to(dtype),
        inputs.to(dtype),
        None if initial is None else initial.to(dtype),
        restarts(document_starts, reverse),
        reverse,
    )
    return states.to(inputs.dtype)
