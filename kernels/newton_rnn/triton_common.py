"""What the Triton kernels of all Newton cells share."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a unit of rounding of 1, in the compiler and the interpreter alike."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def shift_rows(tile, first, rows):
    """Each row moved down by one, below ``first``."""
    index = tl.where(rows > 0, rows - 1, 0)[:, None] + tl.zeros(tile.shape, dtype=tl.int32)
    return tl.where((rows == 0)[:, None], first[None, :], tl.gather(tile, index, 0))


@triton.jit
def pick_row(tile, rows, row):
    return tl.sum(tl.where((rows == row)[:, None], tile, 0.0), 0)


@triton.jit
def largest(tile, mask):
    """The largest magnitude where ``mask``; infinite if a value is not a number, which a maximum would ignore."""
    magnitude = tl.where(tile == tile, tl.abs(tile), float("inf"))
    return tl.max(tl.max(tl.where(mask, magnitude, 0.0), 1), 0)


@triton.jit
def is_small(residual, scale, tolerance):
    """Whether the residual passes. A trajectory that ran off to infinity has an infinite scale as well."""
    return (residual <= tolerance * tl.maximum(scale, 1.0)) & (residual < float("inf"))


@triton.jit
def load_cuts(cuts, row, token, inside, HAS_CUTS: tl.constexpr):
    """Whether the state before each token is zero; False outside the sequence."""
    if HAS_CUTS:
        return tl.load(cuts + row + token, mask=inside, other=0) != 0
    else:
        return token != token


@triton.jit
def load_gates(gates, row, token, channel, mask, channels):
    """The three (tokens, channels) tiles of pre-activations; zero where not ``mask``."""
    offset = (row + token)[:, None] * 3 * channels + channel[None, :]
    first = tl.load(gates + offset, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(gates + offset + channels, mask=mask, other=0.0).to(tl.float32)
    third = tl.load(gates + offset + 2 * channels, mask=mask, other=0.0).to(tl.float32)
    return first, second, third


@triton.jit
def load_three(base, channel, in_channels, channels):
    """The rows of a (3, channels) weight."""
    first = tl.load(base + channel, mask=in_channels, other=0.0)
    second = tl.load(base + channels + channel, mask=in_channels, other=0.0)
    third = tl.load(base + 2 * channels + channel, mask=in_channels, other=0.0)
    return first, second, third


@triton.jit
def store_gates(gates, row, token, channel, mask, channels, first, second, third):
    """The inverse of ``load_gates``."""
    offset = (row + token)[:, None] * 3 * channels + channel[None, :]
    kind = gates.dtype.element_ty
    tl.store(gates + offset, first.to(kind), mask=mask)
    tl.store(gates + offset + channels, second.to(kind), mask=mask)
    tl.store(gates + offset + 2 * channels, third.to(kind), mask=mask)


@triton.jit
def store_report(residuals, counts, residual, iterations, fallbacks):
    """Per program, so that no two programs write to one place: reduced afterwards."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(residuals + program, residual)
    tl.store(counts + program * 2, iterations)
    tl.store(counts + program * 2 + 1, fallbacks)
