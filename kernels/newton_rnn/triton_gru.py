"""Triton kernels of the ParaGRU: a whole Newton solve per program, and its adjoint. Equations: ``gru.GRUCell``.

One program per sequence and block of channels walks through blocks of tokens. Inside a block it repeats Newton steps,
each an associative scan, until the block's residual is small enough; if it never is, it goes through the block token by
token. The next block starts from the exact last state. Nothing but inputs and states touches memory.
"""

import triton
import triton.language as tl

from kernels.affine_scan.triton_diagonal import compose_diagonal
from kernels.newton_rnn.triton_common import (
    is_small,
    largest,
    load_cuts,
    load_gates,
    load_three,
    pick_row,
    shift_rows,
    store_gates,
    store_report,
    tanh,
)


@triton.jit
def gru_gates(state, update_input, reset_input, candidate_input, update_weight, reset_weight, candidate_weight):
    """z, r, n and a_n h."""
    update = tl.sigmoid(update_input + state * update_weight)
    reset = tl.sigmoid(reset_input + state * reset_weight)
    weighted = state * candidate_weight
    return update, reset, tanh(candidate_input + weighted * reset), weighted


@triton.jit
def gru_jacobian(state, update, reset, candidate, weighted, update_weight, reset_weight, candidate_weight):
    """dh'/dh."""
    closed = 1.0 - update
    inner = reset * (candidate_weight + weighted * (1.0 - reset) * reset_weight)
    return (
        closed * (1.0 + (candidate - state) * update * update_weight) + update * (1.0 - candidate * candidate) * inner
    )


@triton.jit
def newton_gru_kernel(
    gates, recurrent, initial, cuts, states, residuals, counts,
    sequence, channels, tolerance,
    ITERATIONS: tl.constexpr, MAX_ITERATIONS: tl.constexpr, HAS_CUTS: tl.constexpr,
    BLOCK_TIME: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The states (batch, sequence, channels), fp32, from fp32 weights (3, channels) and initial state."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < channels
    rows = tl.arange(0, BLOCK_TIME)
    row = batch * sequence
    a_z, a_r, a_n = load_three(recurrent, channel, in_channels, channels)
    carried = tl.load(initial + batch * channels + channel, mask=in_channels, other=0.0)
    worst, most, fallbacks = 0.0, 0, 0
    for start in range(0, sequence, BLOCK_TIME):
        token = start + rows
        inside = token < sequence
        mask = inside[:, None] & in_channels[None, :]
        cut = load_cuts(cuts, row, token, inside, HAS_CUTS)[:, None]
        p_z, p_r, p_n = load_gates(gates, row, token, channel, mask, channels)
        state = tl.sigmoid(p_z) * tanh(p_n)
        iteration = 0
        residual = 0.0
        pending = 1
        while pending == 1:
            before = tl.where(cut, 0.0, shift_rows(state, carried, rows))
            z, r, n, weighted = gru_gates(before, p_z, p_r, p_n, a_z[None, :], a_r[None, :], a_n[None, :])
            missing = before + z * (n - before) - state
            residual = largest(missing, mask)
            solved = is_small(residual, largest(state, mask), tolerance)
            if (solved & (iteration >= ITERATIONS)) | (iteration >= MAX_ITERATIONS):
                pending = 0
            else:
                slope = gru_jacobian(before, z, r, n, weighted, a_z[None, :], a_r[None, :], a_n[None, :])
                _, change = tl.associative_scan((tl.where(cut, 0.0, slope), missing), 0, compose_diagonal)
                state += change
                iteration += 1
        if is_small(residual, largest(state, mask), tolerance):
            worst = tl.maximum(worst, residual)
        else:
            fallbacks += 1
            value = carried
            for index in range(0, BLOCK_TIME):
                here = rows == index
                dropped = tl.max((here[:, None] & cut).to(tl.int32), 0) > 0
                value = tl.where(dropped, 0.0, value)
                z, r, n, weighted = gru_gates(
                    value, pick_row(p_z, rows, index), pick_row(p_r, rows, index), pick_row(p_n, rows, index),
                    a_z, a_r, a_n,
                )  # fmt: skip
                value = value + z * (n - value)
                state = tl.where(here[:, None], value[None, :], state)
        most = tl.maximum(most, iteration)
        tl.store(states + (row + token)[:, None] * channels + channel[None, :], state, mask=mask)
        carried = pick_row(state, rows, BLOCK_TIME - 1)
    store_report(residuals, counts, worst, most, fallbacks)


@triton.jit
def newton_gru_backward_kernel(
    gates, recurrent, initial, cuts, states, states_gradient, final_gradient,
    gates_gradient, recurrent_gradient, initial_gradient,
    sequence, channels,
    HAS_CUTS: tl.constexpr, BLOCK_TIME: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The adjoint from the last token to the first, carrying m_t = J_t l_t, and the gradients that follow from it.

    ``recurrent_gradient`` is fp32 (batch, 3, channels): each program's own sum over its sequence.
    """
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < channels
    rows = tl.arange(0, BLOCK_TIME)
    row = batch * sequence
    a_z, a_r, a_n = load_three(recurrent, channel, in_channels, channels)
    first_state = tl.load(initial + batch * channels + channel, mask=in_channels, other=0.0)
    carried = tl.load(final_gradient + batch * channels + channel, mask=in_channels, other=0.0)
    d_a_z, d_a_r, d_a_n = tl.zeros_like(a_z), tl.zeros_like(a_r), tl.zeros_like(a_n)
    for start in range(0, sequence, BLOCK_TIME):
        token = sequence - 1 - start - rows
        inside = token >= 0
        mask = inside[:, None] & in_channels[None, :]
        cut = load_cuts(cuts, row, token, inside, HAS_CUTS)[:, None]
        p_z, p_r, p_n = load_gates(gates, row, token, channel, mask, channels)
        offset = (row + token)[:, None] * channels + channel[None, :]
        before = tl.load(states + offset - channels, mask=mask & (token > 0)[:, None], other=0.0)
        before = tl.where(cut, 0.0, tl.where((token == 0)[:, None], first_state[None, :], before))
        arriving = tl.load(states_gradient + offset, mask=mask, other=0.0).to(tl.float32)
        z, r, n, weighted = gru_gates(before, p_z, p_r, p_n, a_z[None, :], a_r[None, :], a_n[None, :])
        slope = gru_jacobian(before, z, r, n, weighted, a_z[None, :], a_r[None, :], a_n[None, :])
        # The identity before the first token, so that the last row is always what arrives there.
        slope = tl.where(cut, 0.0, tl.where(inside[:, None], slope, 1.0))
        product, passed = tl.associative_scan((slope, slope * arriving), 0, compose_diagonal)
        passed += product * carried[None, :]
        cotangent = arriving + shift_rows(passed, carried, rows)
        carried = pick_row(passed, rows, BLOCK_TIME - 1)
        cotangent = tl.where(mask, cotangent, 0.0)
        d_z = cotangent * (n - before) * z * (1.0 - z)
        d_n = cotangent * z * (1.0 - n * n)
        d_r = d_n * weighted * r * (1.0 - r)
        store_gates(gates_gradient, row, token, channel, mask, channels, d_z, d_r, d_n)
        d_a_z += tl.sum(d_z * before, 0)
        d_a_r += tl.sum(d_r * before, 0)
        d_a_n += tl.sum(d_n * before * r, 0)
    weights = recurrent_gradient + batch * 3 * channels + channel
    tl.store(weights, d_a_z, mask=in_channels)
    tl.store(weights + channels, d_a_r, mask=in_channels)
    tl.store(weights + 2 * channels, d_a_n, mask=in_channels)
    tl.store(initial_gradient + batch * channels + channel, carried, mask=in_channels)
