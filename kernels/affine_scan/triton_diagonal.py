"""Triton kernels of the diagonal affine scan, one program per sequence and block of channels.

A program goes through the sequence in blocks of tokens, scans each block associatively and carries the last state
in registers. Where the scan goes backwards, tokens are indexed backwards when they are loaded, because Triton's own
reversed scans have been wrong in some versions. All tensors are contiguous with the channels last.
"""

import triton
import triton.language as tl


@triton.jit
def compose_diagonal(first_matrix, first_vector, second_matrix, second_vector):
    """The affine map that applies the first and then the second."""
    return second_matrix * first_matrix, second_matrix * first_vector + second_vector


@triton.jit
def token_at(position, sequence, REVERSE: tl.constexpr):
    """The token that the scan meets at a position."""
    if REVERSE:
        return sequence - 1 - position
    else:
        return position


@triton.jit
def load_cut(cuts, row, position, inside, sequence, HAS_CUTS: tl.constexpr, REVERSE: tl.constexpr):
    """Whether the carried state is dropped before each position; False outside."""
    if HAS_CUTS:
        cut = tl.load(cuts + row + token_at(position, sequence, REVERSE), mask=inside, other=0)
        return cut != 0
    else:
        return position != position


@triton.jit
def affine_scan_diagonal_kernel(
    coefficients, inputs, initial, cuts, states,
    sequence, channels,
    HAS_CUTS: tl.constexpr, REVERSE: tl.constexpr, BLOCK_TIME: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """h_t = a_t h_{t-1} + b_t; ``initial`` is fp32 (batch, channels)."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < channels
    rows = tl.arange(0, BLOCK_TIME)
    row = batch * sequence
    carried = tl.load(initial + batch * channels + channel, mask=in_channels, other=0.0)
    for start in range(0, sequence, BLOCK_TIME):
        position = start + rows
        inside = position < sequence
        mask = inside[:, None] & in_channels[None, :]
        offset = (row + token_at(position, sequence, REVERSE))[:, None] * channels + channel[None, :]
        # Past the end the map is the identity, so that the last row is always the state to carry.
        matrix = tl.load(coefficients + offset, mask=mask, other=1.0).to(tl.float32)
        vector = tl.load(inputs + offset, mask=mask, other=0.0).to(tl.float32)
        cut = load_cut(cuts, row, position, inside, sequence, HAS_CUTS, REVERSE)
        matrix = tl.where(cut[:, None], 0.0, matrix)
        matrix, vector = tl.associative_scan((matrix, vector), 0, compose_diagonal)
        state = matrix * carried[None, :] + vector
        tl.store(states + offset, state.to(states.dtype.element_ty), mask=mask)
        carried = tl.sum(tl.where((rows == BLOCK_TIME - 1)[:, None], state, 0.0), 0)


@triton.jit
def affine_scan_diagonal_backward_kernel(
    coefficients, states, initial, cuts, gradient,
    coefficients_gradient, inputs_gradient, initial_gradient,
    sequence, channels,
    HAS_CUTS: tl.constexpr, REVERSE: tl.constexpr, BLOCK_TIME: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """l_t = g_t + a_{t+1} l_{t+1}, from the last position to the first, and the gradients that follow from it."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < channels
    rows = tl.arange(0, BLOCK_TIME)
    row = batch * sequence
    first_state = tl.load(initial + batch * channels + channel, mask=in_channels, other=0.0)
    carried = tl.zeros_like(first_state)
    for start in range(0, sequence, BLOCK_TIME):
        position = sequence - 1 - start - rows
        inside = position >= 0
        mask = inside[:, None] & in_channels[None, :]
        has_later = position + 1 < sequence
        offset = (row + token_at(position, sequence, REVERSE))[:, None] * channels + channel[None, :]
        later = (row + token_at(position + 1, sequence, REVERSE))[:, None] * channels + channel[None, :]
        earlier = (row + token_at(position - 1, sequence, REVERSE))[:, None] * channels + channel[None, :]
        matrix = tl.load(coefficients + later, mask=mask & has_later[:, None], other=0.0).to(tl.float32)
        later_cut = load_cut(cuts, row, position + 1, inside & has_later, sequence, HAS_CUTS, REVERSE)
        matrix = tl.where(later_cut[:, None], 0.0, tl.where(inside[:, None], matrix, 1.0))
        vector = tl.load(gradient + offset, mask=mask, other=0.0).to(tl.float32)
        matrix, vector = tl.associative_scan((matrix, vector), 0, compose_diagonal)
        adjoint = matrix * carried[None, :] + vector
        carried = tl.sum(tl.where((rows == BLOCK_TIME - 1)[:, None], adjoint, 0.0), 0)
        tl.store(inputs_gradient + offset, adjoint.to(inputs_gradient.dtype.element_ty), mask=mask)
        before = tl.load(states + earlier, mask=mask & (position > 0)[:, None], other=0.0).to(tl.float32)
        before = tl.where((position == 0)[:, None], first_state[None, :], before)
        cut = load_cut(cuts, row, position, inside, sequence, HAS_CUTS, REVERSE)
        product = tl.where(cut[:, None], 0.0, adjoint * before)
        tl.store(coefficients_gradient + offset, product.to(coefficients_gradient.dtype.element_ty), mask=mask)
    first_token = row + token_at(0, sequence, REVERSE)
    matrix = tl.load(coefficients + first_token * channels + channel, mask=in_channels, other=0.0).to(tl.float32)
    if HAS_CUTS:
        matrix = tl.where(tl.load(cuts + first_token) != 0, 0.0, matrix)
    tl.store(initial_gradient + batch * channels + channel, matrix * carried, mask=in_channels)
