"""Triton kernels of the chunkwise state-space recurrence, forward pass (Dao and Gu 2024, arXiv:2405.21060, section 6).

The sequence is cut into chunks, and chunks into tiles. Three kernels do the work:

1. `ssd_score_kernel`: products of the queries and keys within each chunk, once for all heads of a group.
2. `ssd_state_kernel`: the state before every chunk, a recurrence over chunks, written in fp32.
3. `ssd_output_kernel`: the outputs, for all chunks at once, from the state before the chunk and the inside of it.

Layouts: values, keys, queries and outputs are read and written in place through their strides, as (batch, sequence,
heads or groups, size) with a last stride of one. Step sizes and `decay`, the log decay accumulated from the start of
the chunk up to and including each token, are contiguous fp32 (batch * heads, sequence). Scores are (batch * groups,
sequence, CHUNK): reader, and position of the source in the reader's chunk; tiles above the diagonal are never written
nor read. States are contiguous fp32 (batch * heads, num_chunks + 1, HEAD_SIZE, STATE_SIZE).

Every exponent is a sum of log decays and so at most zero; a minimum with zero removes what rounding may add.
Heads vary fastest over programs, so that those of a group find their keys, queries and scores in the cache.
"""

import triton
import triton.language as tl

from kernels.ssd.triton_tiles import (
    keep_of,
    load_state_transposed,
    load_tokens,
    reach_of,
    related_tokens,
    survival_of,
)
from kernels.tiles import load_columns, load_rows, load_state, store_state


@triton.jit
def ssd_score_kernel(
    queries, keys, scores,
    query_stride_batch, query_stride_token, query_stride_group,
    key_stride_batch, key_stride_token, key_stride_group,
    sequence, groups,
    STATE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_STATE: tl.constexpr,
    EVEN_STATE: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of scores: readers of a tile, sources of the tile `back` tiles before it.

    Grid: (tiles, tiles per chunk, batch * groups).
    """
    tile = tl.program_id(0)
    source = tile - tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first = tile // (CHUNK // TILE) * (CHUNK // TILE)
    if source >= first:
        queries += row // groups * query_stride_batch + row % groups * query_stride_group
        keys += row // groups * key_stride_batch + row % groups * key_stride_group
        readers = tile * TILE + tl.arange(0, TILE)
        sources = source * TILE + tl.arange(0, TILE)
        result = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, STATE_SIZE, BLOCK_STATE):
            states = start + tl.arange(0, BLOCK_STATE)
            query_tile = load_rows(
                queries, readers, states, query_stride_token, sequence, STATE_SIZE, EVEN_STATE, DOT_DTYPE
            )
            key_tile = load_columns(
                keys, sources, states, key_stride_token, sequence, STATE_SIZE, EVEN_STATE, DOT_DTYPE
            )
            result += tl.dot(query_tile, key_tile, input_precision=PRECISION)
        columns = (source - first) * TILE + tl.arange(0, TILE)
        pointers = scores + (row * sequence + readers)[:, None] * CHUNK + columns[None, :]
        tl.store(pointers, result.to(scores.dtype.element_ty), mask=(readers < sequence)[:, None])


@triton.jit
def ssd_state_kernel(
    values, keys, steps, decay, documents, states,
    value_stride_batch, value_stride_token, value_stride_head,
    key_stride_batch, key_stride_token, key_stride_group,
    sequence, heads, heads_per_group, num_chunks,
    HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_STATE: tl.constexpr, EVEN_VALUE: tl.constexpr, EVEN_STATE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before every chunk and after the last; `states[:, 0]` holds the initial one on entry.

    Each program carries one tile of the state over all chunks. Grid: (heads, state blocks, batch * value blocks).
    """
    head = tl.program_id(0)
    value_blocks: tl.constexpr = (HEAD_SIZE + BLOCK_VALUE - 1) // BLOCK_VALUE
    batch = (tl.program_id(2) // value_blocks).to(tl.int64)
    row = batch * heads + head
    values += batch * value_stride_batch + head * value_stride_head
    keys += batch * key_stride_batch + head // heads_per_group * key_stride_group
    steps += row * sequence
    decay += row * sequence
    states += row * (num_chunks + 1) * (HEAD_SIZE * STATE_SIZE)
    if HAS_DOCUMENTS:
        documents += batch * sequence
    channels = tl.program_id(2) % value_blocks * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    columns = tl.program_id(1) * BLOCK_STATE + tl.arange(0, BLOCK_STATE)
    EVEN: tl.constexpr = EVEN_VALUE and EVEN_STATE
    state = load_state(states, channels, columns, HEAD_SIZE, STATE_SIZE, EVEN)
    for chunk in range(num_chunks):
        state = state * keep_of(decay, documents, chunk, sequence, CHUNK, HAS_DOCUMENTS)
        for tile in range(0, CHUNK // TILE):
            tokens = chunk * CHUNK + tile * TILE + tl.arange(0, TILE)
            survival = survival_of(decay, documents, tokens, chunk, sequence, CHUNK, HAS_DOCUMENTS)
            weight = survival * load_tokens(steps, tokens, sequence)
            value_tile = load_columns(
                values, tokens, channels, value_stride_token, sequence, HEAD_SIZE, EVEN_VALUE, tl.float32
            )
            key_tile = load_rows(keys, tokens, columns, key_stride_token, sequence, STATE_SIZE, EVEN_STATE, DOT_DTYPE)
            weighted = (value_tile * weight[None, :]).to(DOT_DTYPE)
            state += tl.dot(weighted, key_tile, input_precision=PRECISION)
        states += HEAD_SIZE * STATE_SIZE
        store_state(states, state, channels, columns, HEAD_SIZE, STATE_SIZE, EVEN)


@triton.jit
def ssd_output_kernel(
    values, queries, scores, steps, decay, documents, states, skip, outputs,
    value_stride_batch, value_stride_token, value_stride_head,
    query_stride_batch, query_stride_token, query_stride_group,
    output_stride_batch, output_stride_token, output_stride_head,
    sequence, heads, heads_per_group, num_chunks,
    HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_STATE: tl.constexpr, EVEN_VALUE: tl.constexpr, EVEN_STATE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_SKIP: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one tile of tokens and one block of channels. Grid: (heads, tiles, batch * value blocks)."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    value_blocks: tl.constexpr = (HEAD_SIZE + BLOCK_VALUE - 1) // BLOCK_VALUE
    batch = (tl.program_id(2) // value_blocks).to(tl.int64)
    group = head // heads_per_group
    row = batch * heads + head
    values += batch * value_stride_batch + head * value_stride_head
    queries += batch * query_stride_batch + group * query_stride_group
    outputs += batch * output_stride_batch + head * output_stride_head
    scores += (batch * (heads // heads_per_group) + group) * sequence * CHUNK
    steps += row * sequence
    decay += row * sequence
    if HAS_DOCUMENTS:
        documents += batch * sequence
    chunk = tile // (CHUNK // TILE)
    states += (row * (num_chunks + 1) + chunk) * (HEAD_SIZE * STATE_SIZE)
    channels = tl.program_id(2) % value_blocks * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    tokens = tile * TILE + tl.arange(0, TILE)

    # What the state before the chunk contributes.
    result = tl.zeros((TILE, BLOCK_VALUE), dtype=tl.float32)
    for start in range(0, STATE_SIZE, BLOCK_STATE):
        columns = start + tl.arange(0, BLOCK_STATE)
        query_tile = load_rows(
            queries, tokens, columns, query_stride_token, sequence, STATE_SIZE, EVEN_STATE, DOT_DTYPE
        )
        state = load_state_transposed(states, columns, channels, HEAD_SIZE, STATE_SIZE, EVEN_VALUE and EVEN_STATE)
        result += tl.dot(query_tile, state.to(DOT_DTYPE), input_precision=PRECISION)
    result = result * reach_of(decay, documents, tokens, chunk, sequence, CHUNK, HAS_DOCUMENTS)[:, None]

    # What the tokens of the chunk contribute, one tile after the other up to the diagonal.
    total = load_tokens(decay, tokens, sequence)
    for source in range(chunk * (CHUNK // TILE), tile + 1):
        sources = source * TILE + tl.arange(0, TILE)
        difference = total[:, None] - load_tokens(decay, sources, sequence)[None, :]
        weight = tl.exp(tl.minimum(difference, 0.0)) * load_tokens(steps, sources, sequence)[None, :]
        score = load_rows(scores, tokens, sources - chunk * CHUNK, CHUNK, sequence, CHUNK, True, tl.float32)
        related = related_tokens(documents, tokens, sources, sequence, HAS_DOCUMENTS)
        pairs = tl.where(related, score * weight, 0.0)
        value_tile = load_rows(
            values, sources, channels, value_stride_token, sequence, HEAD_SIZE, EVEN_VALUE, DOT_DTYPE
        )
        result += tl.dot(pairs.to(DOT_DTYPE), value_tile, input_precision=PRECISION)

    if HAS_SKIP:
        value_tile = load_rows(
            values, tokens, channels, value_stride_token, sequence, HEAD_SIZE, EVEN_VALUE, tl.float32
        )
        result += tl.load(skip + head) * value_tile
    mask = (tokens < sequence)[:, None]
    if not EVEN_VALUE:
        mask = mask & (channels < HEAD_SIZE)[None, :]
    pointers = outputs + tokens.to(tl.int64)[:, None] * output_stride_token + channels[None, :]
    tl.store(pointers, result.to(outputs.dtype.element_ty), mask=mask)
