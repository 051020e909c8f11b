"""Triton kernels of the chunkwise state-space recurrence, backward pass: gradients of values, queries and keys.

Each has two parts, as the output has: one through the state at the chunk's boundary (the state before the chunk for
queries, the gradient of the state after it for keys and values), and one through the tokens of the chunk, tile by tile.
Gradients of queries and keys add up over the heads of a slice. `triton_backward` tells how the rest fits together.
"""

import triton
import triton.language as tl

from kernels.ssd.triton_tiles import (
    load_state_transposed,
    load_tokens,
    reach_of,
    related_sources,
    survival_of,
)
from kernels.tiles import load_columns, load_rows, load_state


@triton.jit
def ssd_value_gradient_kernel(
    values, keys, output_gradient, scores, steps, decay, documents, state_gradients, skip,
    value_gradient, step_products, lost_products, skip_products,
    value_stride_batch, value_stride_token, value_stride_head,
    key_stride_batch, key_stride_token, key_stride_group,
    gradient_stride_batch, gradient_stride_token, gradient_stride_head,
    result_stride_batch, result_stride_token, result_stride_head,
    sequence, heads, heads_per_group, num_chunks, rows,
    HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_STATE: tl.constexpr, EVEN_VALUE: tl.constexpr, EVEN_STATE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_SKIP: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the values of one tile of tokens and one block of channels, and that block's inner products.

    With u = step * value: `step_products` <value, du>, `lost_products` what the token adds to the state after the
    chunk times the gradient there, `skip_products` <value, dy>, each (value blocks, batch * heads, sequence).
    Grid: (heads, tiles, batch * value blocks).
    """
    head = tl.program_id(0)
    tile = tl.program_id(1)
    value_blocks: tl.constexpr = (HEAD_SIZE + BLOCK_VALUE - 1) // BLOCK_VALUE
    value_block = tl.program_id(2) % value_blocks
    batch = (tl.program_id(2) // value_blocks).to(tl.int64)
    group = head // heads_per_group
    row = batch * heads + head
    values += batch * value_stride_batch + head * value_stride_head
    keys += batch * key_stride_batch + group * key_stride_group
    output_gradient += batch * gradient_stride_batch + head * gradient_stride_head
    value_gradient += batch * result_stride_batch + head * result_stride_head
    scores += (batch * (heads // heads_per_group) + group) * sequence * CHUNK
    steps += row * sequence
    decay += row * sequence
    if HAS_DOCUMENTS:
        documents += batch * sequence
    chunk = tile // (CHUNK // TILE)
    state_gradients += (row * (num_chunks + 1) + chunk + 1) * (HEAD_SIZE * STATE_SIZE)
    channels = value_block * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    tokens = tile * TILE + tl.arange(0, TILE)
    valid = tokens < sequence
    step = load_tokens(steps, tokens, sequence)
    value_tile = load_rows(values, tokens, channels, value_stride_token, sequence, HEAD_SIZE, EVEN_VALUE, tl.float32)

    # Through the state after the chunk.
    result = tl.zeros((TILE, BLOCK_VALUE), dtype=tl.float32)
    for start in range(0, STATE_SIZE, BLOCK_STATE):
        columns = start + tl.arange(0, BLOCK_STATE)
        key_tile = load_rows(keys, tokens, columns, key_stride_token, sequence, STATE_SIZE, EVEN_STATE, DOT_DTYPE)
        gradient = load_state_transposed(
            state_gradients, columns, channels, HEAD_SIZE, STATE_SIZE, EVEN_VALUE and EVEN_STATE
        )
        result += tl.dot(key_tile, gradient.to(DOT_DTYPE), input_precision=PRECISION)
    result = result * survival_of(decay, documents, tokens, chunk, sequence, CHUNK, HAS_DOCUMENTS)[:, None]
    place = (value_block.to(tl.int64) * rows + row) * sequence + tokens
    tl.store(lost_products + place, tl.sum(result * value_tile, axis=1) * step, mask=valid)

    # Through the outputs of the chunk, from the diagonal on.
    total = load_tokens(decay, tokens, sequence)
    tiles_end = tl.minimum((chunk + 1) * (CHUNK // TILE), tl.cdiv(sequence, TILE))
    for reader in range(tile, tiles_end):
        readers = reader * TILE + tl.arange(0, TILE)
        difference = load_tokens(decay, readers, sequence)[None, :] - total[:, None]
        score = load_columns(scores, readers, tokens - chunk * CHUNK, CHUNK, sequence, CHUNK, True, tl.float32)
        related = related_sources(documents, tokens, readers, sequence, HAS_DOCUMENTS)
        pairs = tl.where(related, score * tl.exp(tl.minimum(difference, 0.0)), 0.0)
        gradient_tile = load_rows(
            output_gradient, readers, channels, gradient_stride_token, sequence, HEAD_SIZE, EVEN_VALUE, DOT_DTYPE
        )
        result += tl.dot(pairs.to(DOT_DTYPE), gradient_tile, input_precision=PRECISION)
    tl.store(step_products + place, tl.sum(result * value_tile, axis=1), mask=valid)
    result = result * step[:, None]

    if HAS_SKIP:
        own = load_rows(
            output_gradient, tokens, channels, gradient_stride_token, sequence, HEAD_SIZE, EVEN_VALUE, tl.float32
        )
        result += tl.load(skip + head) * own
        tl.store(skip_products + place, tl.sum(own * value_tile, axis=1), mask=valid)
    mask = valid[:, None]
    if not EVEN_VALUE:
        mask = mask & (channels < HEAD_SIZE)[None, :]
    pointers = value_gradient + tokens.to(tl.int64)[:, None] * result_stride_token + channels[None, :]
    tl.store(pointers, result.to(value_gradient.dtype.element_ty), mask=mask)


@triton.jit
def ssd_query_gradient_kernel(
    queries, keys, output_gradient, score_gradients, decay, documents, states, query_gradient, read_products,
    query_stride_batch, query_stride_token, query_stride_group,
    key_stride_batch, key_stride_token, key_stride_group,
    gradient_stride_batch, gradient_stride_token, gradient_stride_head,
    sequence, heads, groups, slices, num_chunks, rows,
    HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_STATE: tl.constexpr, EVEN_VALUE: tl.constexpr, EVEN_STATE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of one tile of tokens through the heads of one slice.

    `query_gradient` is contiguous (batch, sequence, slices, STATE_SIZE). `read_products` (state blocks, batch * heads,
    sequence) receives each block's part of what a token reads from the state before the chunk, times its gradient.
    Grid: (slices, tiles, batch * state blocks).
    """
    slice_index = tl.program_id(0)
    tile = tl.program_id(1)
    state_blocks: tl.constexpr = (STATE_SIZE + BLOCK_STATE - 1) // BLOCK_STATE
    state_block = tl.program_id(2) % state_blocks
    batch = (tl.program_id(2) // state_blocks).to(tl.int64)
    group = slice_index // (slices // groups)
    heads_per_slice = heads // slices
    queries += batch * query_stride_batch + group * query_stride_group
    keys += batch * key_stride_batch + group * key_stride_group
    score_gradients += (batch * slices + slice_index) * sequence * CHUNK
    if HAS_DOCUMENTS:
        documents += batch * sequence
    chunk = tile // (CHUNK // TILE)
    columns = state_block * BLOCK_STATE + tl.arange(0, BLOCK_STATE)
    tokens = tile * TILE + tl.arange(0, TILE)
    valid = tokens < sequence
    result = tl.zeros((TILE, BLOCK_STATE), dtype=tl.float32)

    # Through the states before the chunk.
    for index in range(heads_per_slice):
        head = slice_index * heads_per_slice + index
        row = batch * heads + head
        state = states + (row * (num_chunks + 1) + chunk) * (HEAD_SIZE * STATE_SIZE)
        part = tl.zeros((TILE, BLOCK_STATE), dtype=tl.float32)
        for start in range(0, HEAD_SIZE, BLOCK_VALUE):
            channels = start + tl.arange(0, BLOCK_VALUE)
            gradient_tile = load_rows(
                output_gradient + batch * gradient_stride_batch + head * gradient_stride_head,
                tokens, channels, gradient_stride_token, sequence, HEAD_SIZE, EVEN_VALUE, DOT_DTYPE,
            )  # fmt: skip
            state_tile = load_state(state, channels, columns, HEAD_SIZE, STATE_SIZE, EVEN_VALUE and EVEN_STATE)
            part += tl.dot(gradient_tile, state_tile.to(DOT_DTYPE), input_precision=PRECISION)
        part = (
            part * reach_of(decay + row * sequence, documents, tokens, chunk, sequence, CHUNK, HAS_DOCUMENTS)[:, None]
        )
        query_tile = load_rows(
            queries, tokens, columns, query_stride_token, sequence, STATE_SIZE, EVEN_STATE, tl.float32
        )
        place = (state_block.to(tl.int64) * rows + row) * sequence + tokens
        tl.store(read_products + place, tl.sum(part * query_tile, axis=1), mask=valid)
        result += part

    # Through the scores.
    for source in range(chunk * (CHUNK // TILE), tile + 1):
        sources = source * TILE + tl.arange(0, TILE)
        gradient_tile = load_rows(
            score_gradients, tokens, sources - chunk * CHUNK, CHUNK, sequence, CHUNK, True, DOT_DTYPE
        )
        key_tile = load_rows(keys, sources, columns, key_stride_token, sequence, STATE_SIZE, EVEN_STATE, DOT_DTYPE)
        result += tl.dot(gradient_tile, key_tile, input_precision=PRECISION)

    mask = valid[:, None]
    if not EVEN_STATE:
        mask = mask & (columns < STATE_SIZE)[None, :]
    places = ((batch * sequence + tokens) * slices + slice_index)[:, None] * STATE_SIZE + columns[None, :]
    tl.store(query_gradient + places, result.to(query_gradient.dtype.element_ty), mask=mask)


@triton.jit
def ssd_key_gradient_kernel(
    values, queries, score_gradients, steps, decay, documents, state_gradients, key_gradient,
    value_stride_batch, value_stride_token, value_stride_head,
    query_stride_batch, query_stride_token, query_stride_group,
    sequence, heads, groups, slices, num_chunks,
    HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_STATE: tl.constexpr, EVEN_VALUE: tl.constexpr, EVEN_STATE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys of one tile of tokens through the heads of one slice.

    `key_gradient` is contiguous (batch, sequence, slices, STATE_SIZE). Grid: (slices, tiles, batch * state blocks).
    """
    slice_index = tl.program_id(0)
    tile = tl.program_id(1)
    state_blocks: tl.constexpr = (STATE_SIZE + BLOCK_STATE - 1) // BLOCK_STATE
    batch = (tl.program_id(2) // state_blocks).to(tl.int64)
    group = slice_index // (slices // groups)
    heads_per_slice = heads // slices
    queries += batch * query_stride_batch + group * query_stride_group
    score_gradients += (batch * slices + slice_index) * sequence * CHUNK
    if HAS_DOCUMENTS:
        documents += batch * sequence
    chunk = tile // (CHUNK // TILE)
    columns = tl.program_id(2) % state_blocks * BLOCK_STATE + tl.arange(0, BLOCK_STATE)
    tokens = tile * TILE + tl.arange(0, TILE)
    result = tl.zeros((TILE, BLOCK_STATE), dtype=tl.float32)

    # Through the states after the chunk.
    for index in range(heads_per_slice):
        head = slice_index * heads_per_slice + index
        row = batch * heads + head
        state_gradient = state_gradients + (row * (num_chunks + 1) + chunk + 1) * (HEAD_SIZE * STATE_SIZE)
        survival = survival_of(decay + row * sequence, documents, tokens, chunk, sequence, CHUNK, HAS_DOCUMENTS)
        weight = survival * load_tokens(steps + row * sequence, tokens, sequence)
        part = tl.zeros((TILE, BLOCK_STATE), dtype=tl.float32)
        for start in range(0, HEAD_SIZE, BLOCK_VALUE):
            channels = start + tl.arange(0, BLOCK_VALUE)
            value_tile = load_rows(
                values + batch * value_stride_batch + head * value_stride_head,
                tokens, channels, value_stride_token, sequence, HEAD_SIZE, EVEN_VALUE, DOT_DTYPE,
            )  # fmt: skip
            gradient = load_state(state_gradient, channels, columns, HEAD_SIZE, STATE_SIZE, EVEN_VALUE and EVEN_STATE)
            part += tl.dot(value_tile, gradient.to(DOT_DTYPE), input_precision=PRECISION)
        result += part * weight[:, None]

    # Through the scores, from the diagonal on.
    tiles_end = tl.minimum((chunk + 1) * (CHUNK // TILE), tl.cdiv(sequence, TILE))
    for reader in range(tile, tiles_end):
        readers = reader * TILE + tl.arange(0, TILE)
        gradient_tile = load_columns(
            score_gradients, readers, tokens - chunk * CHUNK, CHUNK, sequence, CHUNK, True, DOT_DTYPE
        )
        query_tile = load_rows(
            queries, readers, columns, query_stride_token, sequence, STATE_SIZE, EVEN_STATE, DOT_DTYPE
        )
        result += tl.dot(gradient_tile, query_tile, input_precision=PRECISION)

    mask = (tokens < sequence)[:, None]
    if not EVEN_STATE:
        mask = mask & (columns < STATE_SIZE)[None, :]
    places = ((batch * sequence + tokens) * slices + slice_index)[:, None] * STATE_SIZE + columns[None, :]
    tl.store(key_gradient + places, result.to(key_gradient.dtype.element_ty), mask=mask)
