"""Triton kernels of the affine scan with any number of state components per channel.

A product of two K x K maps costs K times what applying one costs, so beyond two components a loop over tokens with
the state in registers does less work than an associative scan. One program per sequence and block of channels.
"""

import triton
import triton.language as tl

from kernels.affine_scan.triton_diagonal import token_at


@triton.jit
def affine_scan_blocks_kernel(
    coefficients, inputs, initial, cuts, states,
    sequence, channels,
    COMPONENTS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr, HAS_CUTS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """h_t = A_t h_{t-1} + b_t; ``initial`` is fp32 (batch, K, channels)."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    component = tl.arange(0, BLOCK_COMPONENTS)
    in_vector = (component < COMPONENTS)[:, None] & (channel < channels)[None, :]
    in_matrix = (component < COMPONENTS)[:, None, None] & in_vector[None, :, :]
    vector = component[:, None] * channels + channel[None, :]
    matrix = component[:, None, None] * COMPONENTS * channels + vector[None, :, :]
    state_size = COMPONENTS * channels
    state = tl.load(initial + batch * state_size + vector, mask=in_vector, other=0.0)
    for position in range(0, sequence):
        token = batch * sequence + token_at(position, sequence, REVERSE)
        if HAS_CUTS:
            state = tl.where(tl.load(cuts + token) != 0, 0.0, state)
        offset = token * state_size
        factors = tl.load(coefficients + offset * COMPONENTS + matrix, mask=in_matrix, other=0.0).to(tl.float32)
        value = tl.load(inputs + offset + vector, mask=in_vector, other=0.0).to(tl.float32)
        state = tl.sum(factors * state[None, :, :], 1) + value
        tl.store(states + offset + vector, state.to(states.dtype.element_ty), mask=in_vector)


@triton.jit
def affine_scan_blocks_backward_kernel(
    coefficients, states, initial, cuts, gradient,
    coefficients_gradient, inputs_gradient, initial_gradient,
    sequence, channels,
    COMPONENTS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr, HAS_CUTS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The adjoint recurrence, carrying A_{t+1}^T l_{t+1}, and the gradients that follow from it."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    component = tl.arange(0, BLOCK_COMPONENTS)
    in_vector = (component < COMPONENTS)[:, None] & (channel < channels)[None, :]
    in_matrix = (component < COMPONENTS)[:, None, None] & in_vector[None, :, :]
    vector = component[:, None] * channels + channel[None, :]
    matrix = component[:, None, None] * COMPONENTS * channels + vector[None, :, :]
    state_size = COMPONENTS * channels
    first_state = tl.load(initial + batch * state_size + vector, mask=in_vector, other=0.0)
    carried = tl.zeros_like(first_state)
    for step in range(0, sequence):
        position = sequence - 1 - step
        token = batch * sequence + token_at(position, sequence, REVERSE)
        offset = token * state_size
        adjoint = carried + tl.load(gradient + offset + vector, mask=in_vector, other=0.0).to(tl.float32)
        tl.store(inputs_gradient + offset + vector, adjoint.to(inputs_gradient.dtype.element_ty), mask=in_vector)
        has_earlier = (component * 0 + position > 0)[:, None]
        earlier = (batch * sequence + token_at(position - 1, sequence, REVERSE)) * state_size
        before = tl.load(states + earlier + vector, mask=in_vector & has_earlier, other=0.0).to(tl.float32)
        before = tl.where(has_earlier, before, first_state)
        factors = tl.load(coefficients + offset * COMPONENTS + matrix, mask=in_matrix, other=0.0).to(tl.float32)
        if HAS_CUTS:
            cut = tl.load(cuts + token) != 0
            before = tl.where(cut, 0.0, before)
            factors = tl.where(cut, 0.0, factors)
        product = adjoint[:, None, :] * before[None, :, :]
        tl.store(
            coefficients_gradient + offset * COMPONENTS + matrix,
            product.to(coefficients_gradient.dtype.element_ty), mask=in_matrix,
        )  # fmt: skip
        carried = tl.sum(factors * adjoint[:, None, :], 0)
    tl.store(initial_gradient + batch * state_size + vector, carried, mask=in_vector)
