"""Triton kernels of the ParaLSTM, as those of the ParaGRU in ``triton_gru``. Equations: ``lstm.LSTMCell``."""

import triton
import triton.language as tl

from kernels.affine_scan.triton_pairs import compose_pairs
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
def lstm_gates(
    old_cell, old_hidden, forget_input, output_input, candidate_input,
    forget_weight, output_weight, candidate_weight, forget_peephole, output_peephole,
):  # fmt: skip
    """f, the candidate g, c', o and tanh(c')."""
    forget = tl.sigmoid(forget_input + old_hidden * forget_weight + old_cell * forget_peephole)
    candidate = tanh(candidate_input + old_hidden * candidate_weight)
    cell = candidate + forget * (old_cell - candidate)
    output = tl.sigmoid(output_input + old_hidden * output_weight + cell * output_peephole)
    return forget, candidate, cell, output, tanh(cell)


@triton.jit
def lstm_jacobian(
    old_cell, forget, candidate, output, squashed,
    forget_weight, output_weight, candidate_weight, forget_peephole, output_peephole, cut,
):  # fmt: skip
    """dc'/dc, dc'/dh, dh'/dc and dh'/dh; zero where ``cut``."""
    closed = 1.0 - forget
    moved = (old_cell - candidate) * forget * closed
    cell_cell = tl.where(cut, 0.0, forget + moved * forget_peephole)
    cell_hidden = tl.where(cut, 0.0, moved * forget_weight + closed * (1.0 - candidate * candidate) * candidate_weight)
    opened = output * (1.0 - output) * squashed
    through_cell = output * (1.0 - squashed * squashed) + opened * output_peephole
    hidden_hidden = tl.where(cut, 0.0, cell_hidden * through_cell + opened * output_weight)
    return cell_cell, cell_hidden, cell_cell * through_cell, hidden_hidden


@triton.jit
def newton_lstm_kernel(
    gates, recurrent, peephole, initial, cuts, states, residuals, counts,
    sequence, channels, tolerance,
    ITERATIONS: tl.constexpr, MAX_ITERATIONS: tl.constexpr, HAS_CUTS: tl.constexpr,
    BLOCK_TIME: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The states (c, h), (batch, sequence, 2, channels), fp32; weights and initial state are fp32."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < channels
    rows = tl.arange(0, BLOCK_TIME)
    row = batch * sequence
    a_f, a_o, a_g = load_three(recurrent, channel, in_channels, channels)
    w_f = tl.load(peephole + channel, mask=in_channels, other=0.0)
    w_o = tl.load(peephole + channels + channel, mask=in_channels, other=0.0)
    carried_c = tl.load(initial + batch * 2 * channels + channel, mask=in_channels, other=0.0)
    carried_h = tl.load(initial + (batch * 2 + 1) * channels + channel, mask=in_channels, other=0.0)
    worst, most, fallbacks = 0.0, 0, 0
    for start in range(0, sequence, BLOCK_TIME):
        token = start + rows
        inside = token < sequence
        mask = inside[:, None] & in_channels[None, :]
        cut = load_cuts(cuts, row, token, inside, HAS_CUTS)[:, None]
        p_f, p_o, p_g = load_gates(gates, row, token, channel, mask, channels)
        cell = (1.0 - tl.sigmoid(p_f)) * tanh(p_g)
        hidden = tl.sigmoid(p_o + cell * w_o[None, :]) * tanh(cell)
        iteration = 0
        residual = 0.0
        pending = 1
        while pending == 1:
            old_c = tl.where(cut, 0.0, shift_rows(cell, carried_c, rows))
            old_h = tl.where(cut, 0.0, shift_rows(hidden, carried_h, rows))
            f, g, new_c, o, squashed = lstm_gates(
                old_c, old_h, p_f, p_o, p_g, a_f[None, :], a_o[None, :], a_g[None, :], w_f[None, :], w_o[None, :]
            )
            missing_c = new_c - cell
            missing_h = o * squashed - hidden
            residual = tl.maximum(largest(missing_c, mask), largest(missing_h, mask))
            solved = is_small(residual, tl.maximum(largest(cell, mask), largest(hidden, mask)), tolerance)
            if (solved & (iteration >= ITERATIONS)) | (iteration >= MAX_ITERATIONS):
                pending = 0
            else:
                j_cc, j_ch, j_hc, j_hh = lstm_jacobian(
                    old_c, f, g, o, squashed,
                    a_f[None, :], a_o[None, :], a_g[None, :], w_f[None, :], w_o[None, :], cut,
                )  # fmt: skip
                _, _, _, _, change_c, change_h = tl.associative_scan(
                    (j_cc, j_ch, j_hc, j_hh, missing_c, missing_h), 0, compose_pairs
                )
                cell += change_c
                hidden += change_h
                iteration += 1
        if is_small(residual, tl.maximum(largest(cell, mask), largest(hidden, mask)), tolerance):
            worst = tl.maximum(worst, residual)
        else:
            fallbacks += 1
            value_c = carried_c
            value_h = carried_h
            for index in range(0, BLOCK_TIME):
                here = rows == index
                dropped = tl.max((here[:, None] & cut).to(tl.int32), 0) > 0
                value_c = tl.where(dropped, 0.0, value_c)
                value_h = tl.where(dropped, 0.0, value_h)
                f, g, value_c, o, squashed = lstm_gates(
                    value_c, value_h, pick_row(p_f, rows, index), pick_row(p_o, rows, index),
                    pick_row(p_g, rows, index), a_f, a_o, a_g, w_f, w_o,
                )  # fmt: skip
                value_h = o * squashed
                cell = tl.where(here[:, None], value_c[None, :], cell)
                hidden = tl.where(here[:, None], value_h[None, :], hidden)
        most = tl.maximum(most, iteration)
        offset = (row + token)[:, None] * 2 * channels + channel[None, :]
        tl.store(states + offset, cell, mask=mask)
        tl.store(states + offset + channels, hidden, mask=mask)
        carried_c = pick_row(cell, rows, BLOCK_TIME - 1)
        carried_h = pick_row(hidden, rows, BLOCK_TIME - 1)
    store_report(residuals, counts, worst, most, fallbacks)


@triton.jit
def newton_lstm_backward_kernel(
    gates, recurrent, peephole, initial, cuts, states, states_gradient, final_gradient,
    gates_gradient, recurrent_gradient, peephole_gradient, initial_gradient,
    sequence, channels,
    HAS_CUTS: tl.constexpr, BLOCK_TIME: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The adjoint from the last token to the first, carrying m_t = J_t^T l_t, and the gradients that follow from it.

    ``states_gradient`` (batch, sequence, channels) is that of h alone; ``recurrent_gradient`` and
    ``peephole_gradient`` are fp32 (batch, 3 or 2, channels): each program's own sums over its sequence.
    """
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_channels = channel < channels
    rows = tl.arange(0, BLOCK_TIME)
    row = batch * sequence
    a_f, a_o, a_g = load_three(recurrent, channel, in_channels, channels)
    w_f = tl.load(peephole + channel, mask=in_channels, other=0.0)
    w_o = tl.load(peephole + channels + channel, mask=in_channels, other=0.0)
    pair = batch * 2 * channels + channel
    first_c = tl.load(initial + pair, mask=in_channels, other=0.0)
    first_h = tl.load(initial + pair + channels, mask=in_channels, other=0.0)
    carried_c = tl.load(final_gradient + pair, mask=in_channels, other=0.0)
    carried_h = tl.load(final_gradient + pair + channels, mask=in_channels, other=0.0)
    d_a_f, d_a_o, d_a_g = tl.zeros_like(a_f), tl.zeros_like(a_o), tl.zeros_like(a_g)
    d_w_f, d_w_o = tl.zeros_like(w_f), tl.zeros_like(w_o)
    for start in range(0, sequence, BLOCK_TIME):
        token = sequence - 1 - start - rows
        inside = token >= 0
        mask = inside[:, None] & in_channels[None, :]
        cut = load_cuts(cuts, row, token, inside, HAS_CUTS)[:, None]
        p_f, p_o, p_g = load_gates(gates, row, token, channel, mask, channels)
        earlier = (row + token - 1)[:, None] * 2 * channels + channel[None, :]
        earlier_mask = mask & (token > 0)[:, None]
        is_first = (token == 0)[:, None]
        old_c = tl.load(states + earlier, mask=earlier_mask, other=0.0)
        old_h = tl.load(states + earlier + channels, mask=earlier_mask, other=0.0)
        old_c = tl.where(cut, 0.0, tl.where(is_first, first_c[None, :], old_c))
        old_h = tl.where(cut, 0.0, tl.where(is_first, first_h[None, :], old_h))
        arriving = (row + token)[:, None] * channels + channel[None, :]
        arriving = tl.load(states_gradient + arriving, mask=mask, other=0.0).to(tl.float32)
        f, g, cell, o, squashed = lstm_gates(
            old_c, old_h, p_f, p_o, p_g, a_f[None, :], a_o[None, :], a_g[None, :], w_f[None, :], w_o[None, :]
        )
        j_cc, j_ch, j_hc, j_hh = lstm_jacobian(
            old_c, f, g, o, squashed, a_f[None, :], a_o[None, :], a_g[None, :], w_f[None, :], w_o[None, :], cut
        )
        # The identity before the first token, so that the last row is always what arrives there.
        j_cc = tl.where(inside[:, None], j_cc, 1.0)
        j_ch = tl.where(inside[:, None], j_ch, 0.0)
        j_hc = tl.where(inside[:, None], j_hc, 0.0)
        j_hh = tl.where(inside[:, None], j_hh, 1.0)
        t_00, t_01, t_10, t_11, passed_c, passed_h = tl.associative_scan(
            (j_cc, j_hc, j_ch, j_hh, j_hc * arriving, j_hh * arriving), 0, compose_pairs
        )
        passed_c += t_00 * carried_c[None, :] + t_01 * carried_h[None, :]
        passed_h += t_10 * carried_c[None, :] + t_11 * carried_h[None, :]
        from_c = tl.where(mask, shift_rows(passed_c, carried_c, rows), 0.0)
        from_h = tl.where(mask, arriving + shift_rows(passed_h, carried_h, rows), 0.0)
        carried_c = pick_row(passed_c, rows, BLOCK_TIME - 1)
        carried_h = pick_row(passed_h, rows, BLOCK_TIME - 1)
        d_o = from_h * squashed * o * (1.0 - o)
        d_c = from_c + from_h * o * (1.0 - squashed * squashed) + d_o * w_o[None, :]
        d_f = d_c * (old_c - g) * f * (1.0 - f)
        d_g = d_c * (1.0 - f) * (1.0 - g * g)
        store_gates(gates_gradient, row, token, channel, mask, channels, d_f, d_o, d_g)
        d_a_f += tl.sum(d_f * old_h, 0)
        d_a_o += tl.sum(d_o * old_h, 0)
        d_a_g += tl.sum(d_g * old_h, 0)
        d_w_f += tl.sum(d_f * old_c, 0)
        d_w_o += tl.sum(d_o * cell, 0)
    weights = recurrent_gradient + batch * 3 * channels + channel
    tl.store(weights, d_a_f, mask=in_channels)
    tl.store(weights + channels, d_a_o, mask=in_channels)
    tl.store(weights + 2 * channels, d_a_g, mask=in_channels)
    tl.store(peephole_gradient + pair, d_w_f, mask=in_channels)
    tl.store(peephole_gradient + pair + channels, d_w_o, mask=in_channels)
    tl.store(initial_gradient + pair, carried_c, mask=in_channels)
    tl.store(initial_gradient + pair + channels, carried_h, mask=in_channels)
