"""Triton kernels of the affine scan with two state components per channel; as in ``triton_diagonal``."""

import triton
import triton.language as tl

from kernels.affine_scan.triton_diagonal import load_cut, token_at


@triton.jit
def compose_pairs(
    first_00, first_01, first_10, first_11, first_0, first_1,
    second_00, second_01, second_10, second_11, second_0, second_1,
):  # fmt: skip
    """The affine map of two components that applies the first and then the second."""
    return (
        second_00 * first_00 + second_01 * first_10,
        second_00 * first_01 + second_01 * first_11,
        second_10 * first_00 + second_11 * first_10,
        second_10 * first_01 + second_11 * first_11,
        second_00 * first_0 + second_01 * first_1 + second_0,
        second_10 * first_0 + second_11 * first_1 + second_1,
    )


@triton.jit
def load_entry(base, offset, mask, inside, cut, OUTSIDE: tl.constexpr):
    """One entry of the 2x2 coefficients: OUTSIDE the sequence that of the identity, zero where documents are cut."""
    entry = tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)
    return tl.where(cut[:, None], 0.0, tl.where(inside[:, None], entry, OUTSIDE))


@triton.jit
def last_row(tile, rows, BLOCK_TIME: tl.constexpr):
    return tl.sum(tl.where((rows == BLOCK_TIME - 1)[:, None], tile, 0.0), 0)


@triton.jit
def affine_scan_pairs_kernel(
    coefficients, inputs, initial, cuts, states,
    sequence, channels,
    HAS_CUTS: tl.constexpr, REVERSE: tl.constexpr, BLOCK_TIME: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """h_t = A_t h_{t-1} + b_t with 2x2 blocks; ``initial`` is fp32 (batch, 2, channels)."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < channels
    rows = tl.arange(0, BLOCK_TIME)
    row = batch * sequence
    carried_0 = tl.load(initial + batch * 2 * channels + channel, mask=in_channels, other=0.0)
    carried_1 = tl.load(initial + (batch * 2 + 1) * channels + channel, mask=in_channels, other=0.0)
    for start in range(0, sequence, BLOCK_TIME):
        position = start + rows
        inside = position < sequence
        mask = inside[:, None] & in_channels[None, :]
        token = (row + token_at(position, sequence, REVERSE))[:, None] * channels
        vector = token * 2 + channel[None, :]
        matrix = token * 4 + channel[None, :]
        cut = load_cut(cuts, row, position, inside, sequence, HAS_CUTS, REVERSE)
        a_00 = load_entry(coefficients, matrix, mask, inside, cut, 1.0)
        a_01 = load_entry(coefficients, matrix + channels, mask, inside, cut, 0.0)
        a_10 = load_entry(coefficients, matrix + 2 * channels, mask, inside, cut, 0.0)
        a_11 = load_entry(coefficients, matrix + 3 * channels, mask, inside, cut, 1.0)
        b_0 = tl.load(inputs + vector, mask=mask, other=0.0).to(tl.float32)
        b_1 = tl.load(inputs + vector + channels, mask=mask, other=0.0).to(tl.float32)
        a_00, a_01, a_10, a_11, b_0, b_1 = tl.associative_scan((a_00, a_01, a_10, a_11, b_0, b_1), 0, compose_pairs)
        state_0 = a_00 * carried_0[None, :] + a_01 * carried_1[None, :] + b_0
        state_1 = a_10 * carried_0[None, :] + a_11 * carried_1[None, :] + b_1
        tl.store(states + vector, state_0.to(states.dtype.element_ty), mask=mask)
        tl.store(states + vector + channels, state_1.to(states.dtype.element_ty), mask=mask)
        carried_0 = last_row(state_0, rows, BLOCK_TIME)
        carried_1 = last_row(state_1, rows, BLOCK_TIME)


@triton.jit
def affine_scan_pairs_backward_kernel(
    coefficients, states, initial, cuts, gradient,
    coefficients_gradient, inputs_gradient, initial_gradient,
    sequence, channels,
    HAS_CUTS: tl.constexpr, REVERSE: tl.constexpr, BLOCK_TIME: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """l_t = g_t + A_{t+1}^T l_{t+1}, from the last position to the first, and the gradients that follow from it."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < channels
    rows = tl.arange(0, BLOCK_TIME)
    row = batch * sequence
    first_0 = tl.load(initial + batch * 2 * channels + channel, mask=in_channels, other=0.0)
    first_1 = tl.load(initial + (batch * 2 + 1) * channels + channel, mask=in_channels, other=0.0)
    carried_0 = tl.zeros_like(first_0)
    carried_1 = tl.zeros_like(first_1)
    matrix_type = coefficients_gradient.dtype.element_ty
    for start in range(0, sequence, BLOCK_TIME):
        position = sequence - 1 - start - rows
        inside = position >= 0
        mask = inside[:, None] & in_channels[None, :]
        has_later = position + 1 < sequence
        token = (row + token_at(position, sequence, REVERSE))[:, None] * channels
        earlier = (row + token_at(position - 1, sequence, REVERSE))[:, None] * channels * 2 + channel[None, :]
        later = (row + token_at(position + 1, sequence, REVERSE))[:, None] * channels * 4 + channel[None, :]
        vector = token * 2 + channel[None, :]
        matrix = token * 4 + channel[None, :]
        later_cut = load_cut(cuts, row, position + 1, inside & has_later, sequence, HAS_CUTS, REVERSE)
        later_mask = mask & has_later[:, None]
        # Read transposed.
        a_00 = load_entry(coefficients, later, later_mask, inside, later_cut, 1.0)
        a_01 = load_entry(coefficients, later + 2 * channels, later_mask, inside, later_cut, 0.0)
        a_10 = load_entry(coefficients, later + channels, later_mask, inside, later_cut, 0.0)
        a_11 = load_entry(coefficients, later + 3 * channels, later_mask, inside, later_cut, 1.0)
        b_0 = tl.load(gradient + vector, mask=mask, other=0.0).to(tl.float32)
        b_1 = tl.load(gradient + vector + channels, mask=mask, other=0.0).to(tl.float32)
        a_00, a_01, a_10, a_11, b_0, b_1 = tl.associative_scan((a_00, a_01, a_10, a_11, b_0, b_1), 0, compose_pairs)
        adjoint_0 = a_00 * carried_0[None, :] + a_01 * carried_1[None, :] + b_0
        adjoint_1 = a_10 * carried_0[None, :] + a_11 * carried_1[None, :] + b_1
        carried_0 = last_row(adjoint_0, rows, BLOCK_TIME)
        carried_1 = last_row(adjoint_1, rows, BLOCK_TIME)
        tl.store(inputs_gradient + vector, adjoint_0.to(inputs_gradient.dtype.element_ty), mask=mask)
        tl.store(inputs_gradient + vector + channels, adjoint_1.to(inputs_gradient.dtype.element_ty), mask=mask)
        earlier_mask = mask & (position > 0)[:, None]
        is_first = (position == 0)[:, None]
        before_0 = tl.load(states + earlier, mask=earlier_mask, other=0.0).to(tl.float32)
        before_1 = tl.load(states + earlier + channels, mask=earlier_mask, other=0.0).to(tl.float32)
        cut = load_cut(cuts, row, position, inside, sequence, HAS_CUTS, REVERSE)[:, None]
        before_0 = tl.where(cut, 0.0, tl.where(is_first, first_0[None, :], before_0))
        before_1 = tl.where(cut, 0.0, tl.where(is_first, first_1[None, :], before_1))
        tl.store(coefficients_gradient + matrix, (adjoint_0 * before_0).to(matrix_type), mask=mask)
        tl.store(coefficients_gradient + matrix + channels, (adjoint_0 * before_1).to(matrix_type), mask=mask)
        tl.store(coefficients_gradient + matrix + 2 * channels, (adjoint_1 * before_0).to(matrix_type), mask=mask)
        tl.store(coefficients_gradient + matrix + 3 * channels, (adjoint_1 * before_1).to(matrix_type), mask=mask)
    first_token = row + token_at(0, sequence, REVERSE)
    if HAS_CUTS:
        kept = tl.where(tl.load(cuts + first_token) != 0, 0.0, 1.0)
        # A select, not a product: what a cut drops may be infinite.
        carried_0 = tl.where(kept == 0.0, 0.0, carried_0)
        carried_1 = tl.where(kept == 0.0, 0.0, carried_1)
    matrix = coefficients + first_token * channels * 4 + channel
    a_00 = tl.load(matrix, mask=in_channels, other=0.0).to(tl.float32)
    a_01 = tl.load(matrix + channels, mask=in_channels, other=0.0).to(tl.float32)
    a_10 = tl.load(matrix + 2 * channels, mask=in_channels, other=0.0).to(tl.float32)
    a_11 = tl.load(matrix + 3 * channels, mask=in_channels, other=0.0).to(tl.float32)
    out = initial_gradient + batch * 2 * channels + channel
    tl.store(out, a_00 * carried_0 + a_10 * carried_1, mask=in_channels)
    tl.store(out + channels, a_01 * carried_0 + a_11 * carried_1, mask=in_channels)
