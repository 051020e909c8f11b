"""Tiles that the chunkwise Triton kernels read and write."""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    base, tokens, columns, stride, sequence, WIDTH: tl.constexpr, EVEN: tl.constexpr, DOT_DTYPE: tl.constexpr
):
    """A (tokens, columns) tile of a strided (sequence, WIDTH) matrix; zero outside of it."""
    mask = (tokens < sequence)[:, None]
    if not EVEN:
        mask = mask & (columns < WIDTH)[None, :]
    pointers = base + tokens.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(DOT_DTYPE)


@triton.jit
def load_columns(
    base, tokens, columns, stride, sequence, WIDTH: tl.constexpr, EVEN: tl.constexpr, DOT_DTYPE: tl.constexpr
):
    """The transpose of what `load_rows` gives, read transposed rather than transposed after."""
    mask = (tokens < sequence)[None, :]
    if not EVEN:
        mask = mask & (columns < WIDTH)[:, None]
    pointers = base + tokens.to(tl.int64)[None, :] * stride + columns[:, None]
    return tl.load(pointers, mask=mask, other=0.0).to(DOT_DTYPE)


@triton.jit
def load_state(base, rows, columns, NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """A (rows, columns) tile of a contiguous fp32 (NUM_ROWS, NUM_COLUMNS) state; zero outside of it."""
    pointers = base + rows[:, None] * NUM_COLUMNS + columns[None, :]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(rows < NUM_ROWS)[:, None] & (columns < NUM_COLUMNS)[None, :], other=0.0)


@triton.jit
def store_state(base, tile, rows, columns, NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """The inverse of `load_state`."""
    pointers = base + rows[:, None] * NUM_COLUMNS + columns[None, :]
    if EVEN:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=(rows < NUM_ROWS)[:, None] & (columns < NUM_COLUMNS)[None, :])


@triton.jit
def document_before(documents, chunk, CHUNK: tl.constexpr):
    """The document number of the last token before a chunk; zero before the first chunk."""
    return tl.load(documents + chunk * CHUNK - 1, mask=chunk > 0, other=0)
