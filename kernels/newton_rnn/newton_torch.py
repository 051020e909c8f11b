"""Newton's method on the whole trajectory of a recurrent cell, in vectorised torch.

The trajectory H solves F_t(H) = h_t - f(h_{t-1}, x_t) = 0 for all tokens at once. Each Newton step solves the
linear recurrence d_t = J_t d_{t-1} - F_t by the affine scan and moves H by d. The sequence is taken in blocks of
tokens, each starting from the exact state that the one before it ended in: few tokens converge in few steps, and a
block's tensors stay in the cache. A block whose residual does not fall below the tolerance is solved by a loop over
its tokens, for the sequences concerned only, so that the result is right whatever the weights.

The gradient differentiates the solution, not the iterations (implicit function theorem): one adjoint scan with the
Jacobians along the trajectory, then the vector-Jacobian product of the cell at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.affine_scan.two_level_torch import adjoint, cut, solve
from kernels.newton_rnn.cell import Cell

# State elements, over batch, tokens, components and channels, that a block holds: enough to outweigh the cost of
# dispatching an operation, few enough for the dozen temporaries of a cell to stay in a core's cache. Measured.
BLOCK_ELEMENTS = 131072
MINIMUM_BLOCK, MAXIMUM_BLOCK = 32, 1024


class NewtonReport(NamedTuple):
    """How the solve went; tensors, so that reading one is the caller's decision to wait for the device."""

    residual: Tensor  # float32 (): largest |h_t - f(h_{t-1}, x_t)| of the returned trajectory
    iterations: Tensor  # int64 (): most Newton steps that any block of tokens took
    fallbacks: Tensor  # int64 (): (sequence, block) pairs, of channels too on a GPU, solved token by token


@dataclass(frozen=True)
class Settings:
    """When to stop.

    Attributes:
        iterations: Newton steps before the residual is first looked at.
        max_iterations: steps after which a block that is still above the tolerance is solved token by token.
        tolerance: largest residual, relative to the larger of 1 and the largest state; None: 16 units of rounding.
        is_sequential: take no Newton steps; solve everything token by token. The gradient is the same.
    """

    iterations: int
    max_iterations: int
    tolerance: float | None
    is_sequential: bool = False

    def threshold(self, dtype: torch.dtype) -> float:
        return 16 * torch.finfo(dtype).eps if self.tolerance is None else self.tolerance


def block_length(state: Tensor) -> int:
    """Tokens per block for a state (batch, ...) before the first token."""
    return min(MAXIMUM_BLOCK, max(MINIMUM_BLOCK, BLOCK_ELEMENTS // state.numel()))


def blocks_of(sequence: int, length: int) -> list[slice]:
    return [slice(start, min(start + length, sequence)) for start in range(0, sequence, length)]


def solve_sequentially(
    cell: Cell, state: Tensor, inputs: Tensor, parameters: Sequence[Tensor], cuts: Tensor | None
) -> Tensor:
    """The states of a block from the state before it, token by token."""
    states = []
    for token in range(inputs.shape[1]):
        if cuts is not None:
            state = cut(state, cuts[:, token : token + 1])
        state = cell.step(state, inputs[:, token : token + 1], parameters)
        states.append(state)
    return torch.cat(states, dim=1)


def _solve_block(
    cell: Cell, states: Tensor, inputs: Tensor, parameters: Sequence[Tensor], cuts: Tensor | None, settings: Settings
) -> tuple[Tensor, int, int]:
    """Write the states of a block after the state before it, ``states[:, 0]``.

    Returns:
        The largest residual, the Newton steps taken and the number of sequences solved token by token.
    """
    before, after = states[:, :-1], states[:, 1:]
    if settings.is_sequential or inputs.shape[1] == 1:
        after.copy_(solve_sequentially(cell, before[:, :1], inputs, parameters, cuts))
        return after.new_zeros(()), 0, 0
    after.copy_(cell.step(before.new_zeros(()).expand(before.shape), inputs, parameters))
    threshold = settings.threshold(states.dtype)
    within = (1, *range(2, states.dim()))
    for iteration in range(settings.max_iterations + 1):
        previous = cut(before, cuts)
        if iteration >= settings.iterations:
            residual = (cell.step(previous, inputs, parameters) - after).abs_().amax(within)
            converged = residual <= threshold * after.abs().amax(within).clamp(min=1.0)
            # A trajectory that ran off to infinity has an infinite bound as well.
            converged &= residual.isfinite()
            if converged.all() or iteration == settings.max_iterations:
                break
        value, jacobian = cell.linearise(previous, inputs, parameters)
        after += solve(cut(jacobian, cuts), value - after, None)
    if converged.all():
        return residual.max(), iteration, 0
    rows = (~converged).nonzero().flatten()
    row_cuts = None if cuts is None else cuts[rows]
    after[rows] = solve_sequentially(cell, before[rows, :1], inputs[rows], parameters, row_cuts)
    return residual.masked_fill(~converged, 0.0).max(), iteration, len(rows)


class _NewtonSolve(torch.autograd.Function):
    """The trajectory with its exact gradients; keeps the inputs and the states."""

    @staticmethod
    def forward(
        ctx: Any, cell: Cell, settings: Settings, cuts: Tensor | None, initial: Tensor, inputs: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        batch, sequence = inputs.shape[:2]
        states = initial.new_empty(batch, sequence + 1, *initial.shape[1:])
        states[:, 0] = initial
        residual, iterations, fallbacks = initial.new_zeros(()), 0, 0
        for block in blocks_of(sequence, block_length(initial)):
            block_residual, block_iterations, block_fallbacks = _solve_block(
                cell,
                states[:, block.start : block.stop + 1],
                inputs[:, block].to(initial.dtype),
                parameters,
                None if cuts is None else cuts[:, block],
                settings,
            )
            residual = torch.maximum(residual, block_residual)
            iterations = max(iterations, block_iterations)
            fallbacks += block_fallbacks
        ctx.save_for_backward(cuts, states, inputs, *parameters)
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        counts = torch.tensor([iterations, fallbacks], device=inputs.device)
        report = (residual.float(), counts[0].clone(), counts[1].clone())
        ctx.mark_non_differentiable(*report)
        return states[:, 1:], states[:, -1].clone(), *report

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, states_gradient: Tensor | None, final_gradient: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        cuts, states, inputs, *parameters = ctx.saved_tensors
        carried = torch.zeros_like(states[:, 0]) if final_gradient is None else final_gradient
        inputs_gradient = torch.empty_like(inputs)
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        for block in reversed(blocks_of(inputs.shape[1], block_length(carried))):
            block_cuts = None if cuts is None else cuts[:, block]
            previous = cut(states[:, block], block_cuts)
            jacobian, pullback = ctx.cell.pullback(previous, inputs[:, block].to(states.dtype), parameters)
            arriving = torch.zeros_like(previous) if states_gradient is None else states_gradient[:, block]
            cotangent, carried = adjoint(cut(jacobian, block_cuts), arriving, carried)
            inputs_gradient[:, block], gradients = pullback(cotangent)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
        return None, None, None, carried, inputs_gradient, *totals


def newton_solve(
    cell: Cell, inputs: Tensor, parameters: Sequence[Tensor], initial: Tensor, cuts: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, NewtonReport]:
    """The trajectory of a cell.

    Args:
        cell: what to solve.
        inputs: (batch, sequence, ..., channels), any floating dtype.
        parameters, initial: of the dtype of the arithmetic; ``initial`` is (batch, channels) or (batch, K, channels).
        cuts: (batch, sequence) bool, tokens before which the state is zero.
        settings: when to stop.

    Returns:
        The states (batch, sequence, ...), the last of them, both in the dtype of ``initial``, and the report.
    """
    states, final, *report = _NewtonSolve.apply(cell, settings, cuts, initial, inputs, *parameters)
    return states, final, NewtonReport(*report)
