"""Triton kernels of the chunkwise state-space recurrence, backward pass: states, scores and decays.

1. `ssd_state_gradient_kernel`: the gradient of the state after every chunk, from the last chunk to the first.
2. `ssd_score_gradient_kernel`: the gradient of the scores, added up over the heads that share them, and what each pair
   of tokens contributes to the gradients of the decays between them.
3. The gradients of values, keys and queries, for all chunks at once: `triton_backward_tokens`.
4. `ssd_decay_gradient_kernel`: the gradient of every token's log decay. It scales whatever passes from before the
   token to the token or beyond: pairs of tokens within the chunk, what tokens at or after it read from the state before
   the chunk, what tokens before it add to the state after the chunk, and what is left there of the state before.

The inner product of an output with its gradient holds the same sums, but also each token's pair with itself, which no
decay scales, rounded with the output: pairs are therefore told apart and added up on their own.

Layouts are those of `triton_forward`; gradients of scores are laid out as scores are, one for each slice of heads.
"""

import triton
import triton.language as tl

from kernels.ssd.triton_tiles import (
    keep_of,
    load_tokens,
    reach_of,
    related_tokens,
)
from kernels.tiles import load_columns, load_rows, load_state, store_state


@triton.jit
def ssd_state_gradient_kernel(
    queries, output_gradient, decay, documents, states, state_gradients, keep_products,
    query_stride_batch, query_stride_token, query_stride_group,
    gradient_stride_batch, gradient_stride_token, gradient_stride_head,
    sequence, heads, heads_per_group, num_chunks,
    HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_STATE: tl.constexpr, EVEN_VALUE: tl.constexpr, EVEN_STATE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state at every chunk boundary; the last slot holds the final state's on entry.

    `keep_products` (blocks, batch * heads, num_chunks) receives each block's part of the inner product of what is left
    of the state before a chunk, at its end, with the gradient there. Grid: (heads, state blocks, batch * value blocks).
    """
    head = tl.program_id(0)
    value_blocks: tl.constexpr = (HEAD_SIZE + BLOCK_VALUE - 1) // BLOCK_VALUE
    value_block = tl.program_id(2) % value_blocks
    batch = (tl.program_id(2) // value_blocks).to(tl.int64)
    row = batch * heads + head
    rows = tl.num_programs(2) // value_blocks * heads
    queries += batch * query_stride_batch + head // heads_per_group * query_stride_group
    output_gradient += batch * gradient_stride_batch + head * gradient_stride_head
    decay += row * sequence
    slot = (row * (num_chunks + 1) + num_chunks) * (HEAD_SIZE * STATE_SIZE)
    states += slot
    state_gradients += slot
    block = (tl.program_id(1) * value_blocks + value_block).to(tl.int64)
    keep_products += (block * rows + row) * num_chunks
    if HAS_DOCUMENTS:
        documents += batch * sequence
    channels = value_block * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    columns = tl.program_id(1) * BLOCK_STATE + tl.arange(0, BLOCK_STATE)
    EVEN: tl.constexpr = EVEN_VALUE and EVEN_STATE
    gradient = load_state(state_gradients, channels, columns, HEAD_SIZE, STATE_SIZE, EVEN)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step
        states -= HEAD_SIZE * STATE_SIZE
        state_gradients -= HEAD_SIZE * STATE_SIZE
        gradient = gradient * keep_of(decay, documents, chunk, sequence, CHUNK, HAS_DOCUMENTS)
        state = load_state(states, channels, columns, HEAD_SIZE, STATE_SIZE, EVEN)
        tl.store(keep_products + chunk, tl.sum(tl.sum(state * gradient, axis=1), axis=0))
        for tile in range(0, CHUNK // TILE):
            tokens = chunk * CHUNK + tile * TILE + tl.arange(0, TILE)
            reach = reach_of(decay, documents, tokens, chunk, sequence, CHUNK, HAS_DOCUMENTS)
            gradient_tile = load_columns(
                output_gradient, tokens, channels, gradient_stride_token, sequence, HEAD_SIZE, EVEN_VALUE, tl.float32
            )
            query_tile = load_rows(
                queries, tokens, columns, query_stride_token, sequence, STATE_SIZE, EVEN_STATE, DOT_DTYPE
            )
            weighted = (gradient_tile * reach[None, :]).to(DOT_DTYPE)
            gradient += tl.dot(weighted, query_tile, input_precision=PRECISION)
        store_state(state_gradients, gradient, channels, columns, HEAD_SIZE, STATE_SIZE, EVEN)


@triton.jit
def ssd_score_gradient_kernel(
    values, output_gradient, scores, steps, decay, documents,
    score_gradients, reader_products, source_products,
    value_stride_batch, value_stride_token, value_stride_head,
    gradient_stride_batch, gradient_stride_token, gradient_stride_head,
    sequence, heads, groups, slices, rows,
    HEAD_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    EVEN_VALUE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the scores' gradient, added up over the heads of a slice, and of the products behind it.

    Per head and pair of two different tokens, the pair's part of the output times the output's gradient:
    `reader_products` sums it over the sources of one tile, `source_products` over the readers. Both are (tiles per
    chunk, batch * heads, sequence), first the number of tiles between the two, and are zero on entry.
    Grid: (tiles, tiles per chunk, batch * slices).
    """
    tile = tl.program_id(0)
    back = tl.program_id(1)
    source = tile - back
    batch = (tl.program_id(2) // slices).to(tl.int64)
    slice_index = tl.program_id(2) % slices
    heads_per_slice = heads // slices
    first = tile // (CHUNK // TILE) * (CHUNK // TILE)
    if source >= first:
        if HAS_DOCUMENTS:
            documents += batch * sequence
        readers = tile * TILE + tl.arange(0, TILE)
        sources = source * TILE + tl.arange(0, TILE)
        columns = (source - first) * TILE + tl.arange(0, TILE)
        group = slice_index // (slices // groups)
        score = load_rows(
            scores + (batch * groups + group) * sequence * CHUNK, readers, columns, CHUNK, sequence, CHUNK, True,
            tl.float32,
        )  # fmt: skip
        related = related_tokens(documents, readers, sources, sequence, HAS_DOCUMENTS)
        score = tl.where(sources[None, :] < readers[:, None], score, 0.0)
        result = tl.zeros((TILE, TILE), dtype=tl.float32)
        for index in range(heads_per_slice):
            head = slice_index * heads_per_slice + index
            row = batch * heads + head
            product = tl.zeros((TILE, TILE), dtype=tl.float32)
            for start in range(0, HEAD_SIZE, BLOCK_VALUE):
                channels = start + tl.arange(0, BLOCK_VALUE)
                gradient_tile = load_rows(
                    output_gradient + batch * gradient_stride_batch + head * gradient_stride_head,
                    readers, channels, gradient_stride_token, sequence, HEAD_SIZE, EVEN_VALUE, DOT_DTYPE,
                )  # fmt: skip
                value_tile = load_columns(
                    values + batch * value_stride_batch + head * value_stride_head,
                    sources, channels, value_stride_token, sequence, HEAD_SIZE, EVEN_VALUE, DOT_DTYPE,
                )  # fmt: skip
                product += tl.dot(gradient_tile, value_tile, input_precision=PRECISION)
            total = load_tokens(decay + row * sequence, readers, sequence)
            difference = total[:, None] - load_tokens(decay + row * sequence, sources, sequence)[None, :]
            step = load_tokens(steps + row * sequence, sources, sequence)
            product = tl.where(related, product * tl.exp(tl.minimum(difference, 0.0)) * step[None, :], 0.0)
            result += product
            product = product * score
            place = (back.to(tl.int64) * rows + row) * sequence
            tl.store(reader_products + place + readers, tl.sum(product, axis=1), mask=readers < sequence)
            tl.store(source_products + place + sources, tl.sum(product, axis=0), mask=sources < sequence)
        places = (tl.program_id(2).to(tl.int64) * sequence + readers)[:, None] * CHUNK + columns[None, :]
        result = result.to(score_gradients.dtype.element_ty)
        tl.store(score_gradients + places, result, mask=(readers < sequence)[:, None])


@triton.jit
def ssd_decay_gradient_kernel(
    token_products, lost_products, keep_products, documents, decay_gradient,
    sequence, heads, num_chunks,
    CHUNK: tl.constexpr, TILE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Gradient of every token's log decay, fp32 (batch * heads, sequence).

    `token_products`: what a token reads from the tokens and the state before it, less what later tokens of the chunk
    read from it. `lost_products`: what it adds to the state after the chunk. `keep_products` (batch * heads,
    num_chunks): what is left there of the state before. All times the gradient of what they add to.
    Grid: (tiles, batch * heads).
    """
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    tokens = tile * TILE + tl.arange(0, TILE)
    valid = tokens < sequence
    token_products += row * sequence
    lost_products += row * sequence
    first = tile // (CHUNK // TILE) * (CHUNK // TILE)
    keep = tl.load(keep_products + row * num_chunks + first // (CHUNK // TILE))
    result = tl.zeros((TILE,), dtype=tl.float32) + keep
    if HAS_DOCUMENTS:
        documents += (row // heads) * sequence
        document = tl.load(documents + tokens, mask=valid, other=-1)
        before = tl.load(documents + tokens - 1, mask=valid & (tokens > 0), other=0)
    for other in range(first, first + CHUNK // TILE):
        others = other * TILE + tl.arange(0, TILE)
        later = load_tokens(token_products, others, sequence)
        earlier = load_tokens(lost_products, others, sequence)
        terms = tl.where(others[None, :] >= tokens[:, None], later[None, :], earlier[None, :])
        if HAS_DOCUMENTS:
            other_document = tl.load(documents + others, mask=others < sequence, other=-2)
            terms = tl.where(document[:, None] == other_document[None, :], terms, 0.0)
        result += tl.sum(terms, axis=1)
    if HAS_DOCUMENTS:
        # Nothing passes into a document's first token: only rounding would be left of the sums.
        result = tl.where(document == before, result, 0.0)
    tl.store(decay_gradient + row * sequence + tokens, result, mask=valid)
