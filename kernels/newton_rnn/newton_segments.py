"""Newton's method on a trajectory whose segments are on several ranks.

Every iteration solves the linear recurrence of one Newton step over all segments at once: each rank finds what its
segment does to a correction (an affine map), all tell each other, and each goes on from the correction that arrives
at its first token. The residual travels in the same message, so that all ranks stop at the same iteration; an
iteration is one call of ``(size - 1)`` messages of ``(K^2 + K) channels`` numbers per sequence, with K components.
The iterates are those of one rank, but for rounding.

Sequences that do not converge are solved by multiple shooting (Keller 1968): each rank runs its segment token by
token from a guess of the state before it, and Newton's method corrects only the guesses, one per rank. After n rounds
the first n segments are exact, whatever the weights, so it ends after as many rounds as there are ranks.

The gradient is one scan over the segments in the other direction, with the Jacobians of the trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.affine_scan import affine_scan
from kernels.affine_scan.two_level_torch import cut
from kernels.newton_rnn.cell import Cell
from kernels.newton_rnn.newton_torch import NewtonReport, Settings, block_length, blocks_of, solve_sequentially
from kernels.segments import Segments


def newton_solve_segments(
    cell: Cell,
    inputs: Tensor,
    parameters: Sequence[Tensor],
    like: Tensor,
    cuts: Tensor | None,
    settings: Settings,
    segments: Segments,
) -> tuple[Tensor, Tensor, NewtonReport]:
    """This rank's part of the trajectory of a cell, which begins with zero on the first rank.

    Args:
        like: zeros, (batch, channels) or (batch, K, channels), in the dtype of the arithmetic.
        segments: where this rank's segment stands; every rank makes this call.
        cell, inputs, parameters, cuts, settings: as for ``newton_solve``, of this segment.

    Returns:
        As ``newton_solve``; the report is the same on all ranks.
    """
    states, *report = _SegmentsSolve.apply(cell, settings, segments, cuts, like, inputs, *parameters)
    return states, states[:, -1], NewtonReport(*report)


def _multiply(matrix: Tensor, state: Tensor) -> Tensor:
    """(batch, K, K, channels) with (batch, K, channels), or elementwise."""
    return matrix * state if matrix.dim() == state.dim() else torch.einsum("bijd,bjd->bid", matrix, state)


def _product(jacobians: Tensor) -> Tensor:
    """Of all tokens, the last one leftmost: (batch, tokens, ...) to (batch, ...)."""
    if jacobians.dim() == 3:
        return jacobians.prod(1)
    while jacobians.shape[1] > 1:
        odd = jacobians[:, -1:] if jacobians.shape[1] % 2 else None
        pairs = jacobians[:, : jacobians.shape[1] // 2 * 2].unflatten(1, (-1, 2))
        jacobians = torch.einsum("btijd,btjkd->btikd", pairs[:, :, 1], pairs[:, :, 0])
        if odd is not None:
            jacobians = torch.cat([jacobians, odd], 1)
    return jacobians[:, 0]


def _tell(segments: Segments, *tensors: Tensor) -> list[list[Tensor]]:
    """For each rank its tensors, in one call."""
    gathered = segments.all_gather(torch.cat([tensor.flatten() for tensor in tensors]))
    sizes = [tensor.numel() for tensor in tensors]
    return [
        [part.view(tensor.shape) for part, tensor in zip(row.split(sizes), tensors, strict=True)] for row in gathered
    ]


class _Segment:
    """A segment's trajectory while it is being solved; ``states[:, 0]`` is the state before it."""

    def __init__(
        self, cell: Cell, inputs: Tensor, parameters: Sequence[Tensor], cuts: Tensor | None, states: Tensor
    ) -> None:
        self.cell, self.inputs, self.parameters, self.cuts = cell, inputs, parameters, cuts
        self.states, self.before, self.after = states, states[:, :-1], states[:, 1:]

    def linearised(self) -> tuple[Tensor, Tensor]:
        """The step from every state of the trajectory, and its Jacobian, zero where a document begins."""
        value, jacobian = self.cell.linearise(cut(self.before, self.cuts), self.inputs, self.parameters)
        return value, cut(jacobian, self.cuts)

    def rows(self, rows: Tensor) -> _Segment:
        """Some of the sequences, copied."""
        cuts = None if self.cuts is None else self.cuts[rows]
        return _Segment(self.cell, self.inputs[rows], self.parameters, cuts, self.states[rows])

    def run(self) -> None:
        """All states from the one before them, token by token."""
        first = self.states[:, :1].clone()
        self.after.copy_(solve_sequentially(self.cell, first, self.inputs, self.parameters, self.cuts))


def _newton(segment: _Segment, settings: Settings, segments: Segments) -> tuple[Tensor, Tensor, Tensor, int]:
    """Newton's iterations on all sequences.

    Returns:
        What the segment does to a change of the state before it, the largest residual of each sequence over all
        segments, which sequences converged, and how many iterations were made.
    """
    before, after = segment.before, segment.after
    after.copy_(segment.cell.step(torch.zeros_like(after), segment.inputs, segment.parameters))
    arrived = segments.shift(after[:, -1], 1)
    if arrived is not None:
        segment.states[:, 0] = arrived
    threshold, within = settings.threshold(after.dtype), (1, *range(2, after.dim()))
    for iteration in range(settings.max_iterations + 1):
        value, jacobian = segment.linearised()
        residual, size = (value - after).abs().amax(within), after.abs().amax(within)
        # Not to be compared with anything, and the largest of all.
        residual = torch.where(residual.isfinite(), residual, torch.inf)
        own = affine_scan(jacobian, value - after)
        told = _tell(segments, _product(jacobian), own[:, -1], residual, size)
        if iteration >= settings.iterations:
            residual = torch.stack([row[2] for row in told]).amax(0)
            size = torch.stack([row[3] for row in told]).amax(0)
            converged = residual.isfinite() & (residual <= threshold * size.clamp(min=1.0))
            if iteration == settings.max_iterations or converged.all():
                break
        correction = torch.zeros_like(before[:, 0])
        for matrix, last, _, _ in told[: segments.rank]:
            correction = _multiply(matrix, correction) + last
        after += affine_scan(jacobian, value - after, initial=correction)
        segment.states[:, 0] += correction
    return told[segments.rank][0], residual, converged, iteration


def _shoot(segment: _Segment, threshold: float, segments: Segments) -> Tensor:
    """Multiple shooting; returns what the segment does to a change of the state before it."""
    states = segment.states
    states[:, 0] = torch.where(states[:, 0].isfinite(), states[:, 0], 0.0)
    for _ in range(segments.size):
        segment.run()
        matrix = _product(segment.linearised()[1])
        told = _tell(segments, states[:, 0], segment.after[:, -1], matrix)
        guesses = [torch.zeros_like(states[:, 0])]
        for guess, end, matrix_there in told[:-1]:
            moved = guesses[-1] - guess
            change = _multiply(matrix_there, moved)
            # An unchanged guess is exact if what is before it is, and an overflow says nothing.
            guesses.append(end + torch.where((moved == 0).all() | ~change.isfinite(), 0.0, change))
        worst = torch.stack([(new - row[0]).abs().amax() for new, row in zip(guesses, told, strict=True)]).amax()
        largest = torch.stack([row[1].abs().amax() for row in told]).amax()
        if worst <= threshold * largest.clamp(min=1.0):
            break
        states[:, 0] = guesses[segments.rank]
    return matrix


class _SegmentsSolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: Cell, settings: Settings, segments: Segments, cuts: Tensor | None, like: Tensor,
        inputs: Tensor, *parameters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        states = like.new_zeros(inputs.shape[0], inputs.shape[1] + 1, *like.shape[1:])
        segment = _Segment(cell, inputs.to(like.dtype), parameters, cuts, states)
        matrix, residual, converged, iterations = _newton(segment, settings, segments)
        rows = (~converged).nonzero().flatten()
        if len(rows):
            part = segment.rows(rows)
            matrix[rows] = _shoot(part, settings.threshold(like.dtype), segments)
            states[rows] = part.states
        ctx.save_for_backward(cuts, states, matrix, inputs, *parameters)
        ctx.cell, ctx.segments = cell, segments
        counts = torch.tensor([iterations, len(rows)], device=inputs.device)
        worst = residual.masked_fill(~converged, 0.0).max()
        report = (worst.float(), counts[0].clone(), counts[1].clone())
        ctx.mark_non_differentiable(*report)
        return states[:, 1:], *report

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, states_gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        cuts, states, matrix, inputs, *parameters = ctx.saved_tensors
        segments = ctx.segments

        def adjoint(block: slice, arriving: Tensor, keep: bool) -> Any:
            block_cuts = None if cuts is None else cuts[:, block]
            previous = cut(states[:, block], block_cuts)
            jacobian, pullback = ctx.cell.pullback(previous, inputs[:, block].to(states.dtype), parameters)
            jacobian = cut(jacobian, block_cuts)
            if jacobian.dim() == 5:
                jacobian = jacobian.transpose(2, 3)
            gradient = states_gradient[:, block].clone()
            gradient[:, -1] += arriving
            # The last token's Jacobian is for what is before it.
            behind = torch.cat([jacobian[:, 1:], torch.zeros_like(jacobian[:, :1])], 1)
            cotangent = affine_scan(behind, gradient, reverse=True)
            before = _multiply(jacobian[:, 0], cotangent[:, 0])
            return before, pullback(cotangent) if keep else None

        blocks = blocks_of(inputs.shape[1], block_length(states[:, 0]))[::-1]
        own = torch.zeros_like(states[:, 0])
        for block in blocks:
            own, _ = adjoint(block, own, keep=False)
        transposed = matrix.transpose(1, 2) if matrix.dim() == 4 else matrix
        arriving = torch.zeros_like(own)
        for map_there, own_there in reversed(_tell(segments, transposed.contiguous(), own)[segments.rank + 1 :]):
            arriving = _multiply(map_there, arriving) + own_there
        inputs_gradient = torch.empty_like(inputs)
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        for block in blocks:
            arriving, (inputs_gradient[:, block], gradients) = adjoint(block, arriving, keep=True)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
        return None, None, None, None, None, inputs_gradient, *totals
