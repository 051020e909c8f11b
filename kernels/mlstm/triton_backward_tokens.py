"""Triton kernels of the chunkwise mLSTM, backward pass: gradients of queries, keys and values.

Each has two parts, as the output has: one through the state at the chunk's boundary (the state before the
chunk for queries, the gradient of the state after it for keys and values), and one through the tokens of the
chunk, tile by tile. All tokens are computed at once. `triton_backward` tells how the rest fits together.
"""

import triton
import triton.language as tl

from kernels.tiles import document_before, load_columns, load_rows, load_state


@triton.jit
def query_gradient_kernel(
    key, value, output_gradient, decay, log_input, stabilizer, inverse_divisor, denominator_gradient,
    documents, boundary, states, normalizers, query_gradient,
    key_stride_batch, key_stride_token, key_stride_head,
    value_stride_batch, value_stride_token, value_stride_head,
    gradient_stride_batch, gradient_stride_token, gradient_stride_head,
    result_stride_batch, result_stride_token, result_stride_head,
    sequence, heads, num_chunks, scale,
    QUERY_KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, EVEN_KEY: tl.constexpr, EVEN_VALUE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of tokens and one block of columns. Grid: (key blocks, tiles, batch * heads)."""
    tile = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    batch = row // heads
    head = row % heads
    key += batch * key_stride_batch + head * key_stride_head
    value += batch * value_stride_batch + head * value_stride_head
    output_gradient += batch * gradient_stride_batch + head * gradient_stride_head
    query_gradient += batch * result_stride_batch + head * result_stride_head
    decay += row * sequence
    log_input += row * sequence
    chunk = tile // (CHUNK // TILE)
    states += (row * (num_chunks + 1) + chunk) * (QUERY_KEY_SIZE * VALUE_SIZE)
    normalizers += (row * (num_chunks + 1) + chunk) * QUERY_KEY_SIZE
    keys = tl.program_id(0) * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    key_mask = keys < QUERY_KEY_SIZE
    tokens = tile * TILE + tl.arange(0, TILE)
    valid = tokens < sequence
    reach = tl.load(decay + tokens, mask=valid, other=0.0) - tl.load(
        stabilizer + row * sequence + tokens, mask=valid, other=0.0
    )
    inverse = tl.load(inverse_divisor + row * sequence + tokens, mask=valid, other=0.0)
    total_gradient = tl.load(denominator_gradient + row * sequence + tokens, mask=valid, other=0.0)
    carry = tl.exp(tl.minimum(reach + tl.load(boundary + row * (num_chunks + 1) + chunk), 0.0))
    if HAS_DOCUMENTS:
        documents += batch * sequence
        document = tl.load(documents + tokens, mask=valid, other=-1)
        carry = tl.where(document == document_before(documents, chunk, CHUNK), carry, 0.0)

    # Through the state before the chunk: dq = C dN + n dd.
    result = tl.zeros((TILE, BLOCK_KEY), dtype=tl.float32)
    for start in range(0, VALUE_SIZE, BLOCK_VALUE):
        values = start + tl.arange(0, BLOCK_VALUE)
        gradient_tile = load_rows(
            output_gradient, tokens, values, gradient_stride_token, sequence, VALUE_SIZE, EVEN_VALUE,
            DOT_DTYPE,
        )  # fmt: skip
        state = load_state(states, keys, values, QUERY_KEY_SIZE, VALUE_SIZE, EVEN_KEY and EVEN_VALUE)
        result += tl.dot(gradient_tile, tl.trans(state.to(DOT_DTYPE)), input_precision=PRECISION)
    normalizer = tl.load(normalizers + keys, mask=key_mask, other=0.0)
    result = result * (carry * inverse)[:, None] + (carry * total_gradient)[:, None] * normalizer[None, :]

    # Through the tokens of the chunk.
    for source in range(chunk * (CHUNK // TILE), tile + 1):
        source_tokens = source * TILE + tl.arange(0, TILE)
        source_valid = source_tokens < sequence
        offer = tl.load(log_input + source_tokens, mask=source_valid, other=0.0) - tl.load(
            decay + source_tokens, mask=source_valid, other=0.0
        )
        scores = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, VALUE_SIZE, BLOCK_VALUE):
            values = start + tl.arange(0, BLOCK_VALUE)
            gradient_tile = load_rows(
                output_gradient, tokens, values, gradient_stride_token, sequence, VALUE_SIZE, EVEN_VALUE,
                DOT_DTYPE,
            )  # fmt: skip
            value_tile = load_columns(
                value, source_tokens, values, value_stride_token, sequence, VALUE_SIZE, EVEN_VALUE, DOT_DTYPE
            )
            scores += tl.dot(gradient_tile, value_tile, input_precision=PRECISION)
        related = (source_tokens[None, :] <= tokens[:, None]) & valid[:, None]
        if HAS_DOCUMENTS:
            source_document = tl.load(documents + source_tokens, mask=source_valid, other=-2)
            related = related & (document[:, None] == source_document[None, :])
        weight = tl.exp(tl.minimum(reach[:, None] + offer[None, :], 0.0))
        scores = tl.where(related, (scores * inverse[:, None] + total_gradient[:, None]) * weight, 0.0)
        key_tile = load_rows(key, source_tokens, keys, key_stride_token, sequence, QUERY_KEY_SIZE, EVEN_KEY, DOT_DTYPE)
        result += tl.dot(scores.to(DOT_DTYPE), key_tile, input_precision=PRECISION)

    pointers = query_gradient + tokens.to(tl.int64)[:, None] * result_stride_token + keys[None, :]
    result = (result * scale).to(query_gradient.dtype.element_ty)
    tl.store(pointers, result, mask=valid[:, None] & key_mask[None, :])


@triton.jit
def key_gradient_kernel(
    query, key, value, output_gradient, decay, log_input, stabilizer, inverse_divisor, denominator_gradient,
    documents, boundary, state_gradients, normalizer_gradients, key_gradient, key_products,
    query_stride_batch, query_stride_token, query_stride_head,
    key_stride_batch, key_stride_token, key_stride_head,
    value_stride_batch, value_stride_token, value_stride_head,
    gradient_stride_batch, gradient_stride_token, gradient_stride_head,
    result_stride_batch, result_stride_token, result_stride_head,
    sequence, heads, num_chunks, scale,
    QUERY_KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, EVEN_KEY: tl.constexpr, EVEN_VALUE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of one tile of tokens and one block of columns, and that block's part of <k, dk>.

    `key_products` is (key blocks, batch * heads, sequence). Grid: (key blocks, tiles, batch * heads).
    """
    key_block = tl.program_id(0)
    tile = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    batch = row // heads
    head = row % heads
    query += batch * query_stride_batch + head * query_stride_head
    key += batch * key_stride_batch + head * key_stride_head
    value += batch * value_stride_batch + head * value_stride_head
    output_gradient += batch * gradient_stride_batch + head * gradient_stride_head
    key_gradient += batch * result_stride_batch + head * result_stride_head
    decay += row * sequence
    stabilizer += row * sequence
    inverse_divisor += row * sequence
    denominator_gradient += row * sequence
    chunk = tile // (CHUNK // TILE)
    last = tl.minimum((chunk + 1) * CHUNK, sequence) - 1
    slot = row * (num_chunks + 1) + chunk + 1
    state_gradients += slot * (QUERY_KEY_SIZE * VALUE_SIZE)
    keys = key_block * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    key_mask = keys < QUERY_KEY_SIZE
    tokens = tile * TILE + tl.arange(0, TILE)
    valid = tokens < sequence
    offer = tl.load(log_input + row * sequence + tokens, mask=valid, other=0.0) - tl.load(
        decay + tokens, mask=valid, other=0.0
    )
    carry = tl.exp(tl.minimum(tl.load(decay + last) + offer - tl.load(boundary + slot), 0.0))
    if HAS_DOCUMENTS:
        documents += batch * sequence
        document = tl.load(documents + tokens, mask=valid, other=-1)
        carry = tl.where(document == tl.load(documents + last), carry, 0.0)

    # Through the state after the chunk: dk = dC v + dn.
    result = tl.zeros((TILE, BLOCK_KEY), dtype=tl.float32)
    for start in range(0, VALUE_SIZE, BLOCK_VALUE):
        values = start + tl.arange(0, BLOCK_VALUE)
        value_tile = load_rows(value, tokens, values, value_stride_token, sequence, VALUE_SIZE, EVEN_VALUE, DOT_DTYPE)
        gradient = load_state(state_gradients, keys, values, QUERY_KEY_SIZE, VALUE_SIZE, EVEN_KEY and EVEN_VALUE)
        result += tl.dot(value_tile, tl.trans(gradient.to(DOT_DTYPE)), input_precision=PRECISION)
    normalizer = tl.load(normalizer_gradients + slot * QUERY_KEY_SIZE + keys, mask=key_mask, other=0.0)
    result = (result + normalizer[None, :]) * carry[:, None]

    # Through the outputs of the chunk, from the diagonal on.
    tiles_end = tl.minimum((chunk + 1) * (CHUNK // TILE), tl.cdiv(sequence, TILE))
    for reader in range(tile, tiles_end):
        reader_tokens = reader * TILE + tl.arange(0, TILE)
        reader_valid = reader_tokens < sequence
        reach = tl.load(decay + reader_tokens, mask=reader_valid, other=0.0) - tl.load(
            stabilizer + reader_tokens, mask=reader_valid, other=0.0
        )
        inverse = tl.load(inverse_divisor + reader_tokens, mask=reader_valid, other=0.0)
        total_gradient = tl.load(denominator_gradient + reader_tokens, mask=reader_valid, other=0.0)
        scores = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, VALUE_SIZE, BLOCK_VALUE):
            values = start + tl.arange(0, BLOCK_VALUE)
            value_tile = load_rows(
                value, tokens, values, value_stride_token, sequence, VALUE_SIZE, EVEN_VALUE, DOT_DTYPE
            )
            gradient_tile = load_columns(
                output_gradient, reader_tokens, values, gradient_stride_token, sequence, VALUE_SIZE,
                EVEN_VALUE, DOT_DTYPE,
            )  # fmt: skip
            scores += tl.dot(value_tile, gradient_tile, input_precision=PRECISION)
        related = (tokens[:, None] <= reader_tokens[None, :]) & reader_valid[None, :]
        if HAS_DOCUMENTS:
            reader_document = tl.load(documents + reader_tokens, mask=reader_valid, other=-2)
            related = related & (document[:, None] == reader_document[None, :])
        weight = tl.exp(tl.minimum(reach[None, :] + offer[:, None], 0.0)) * scale
        scores = tl.where(related, (scores * inverse[None, :] + total_gradient[None, :]) * weight, 0.0)
        query_tile = load_rows(
            query, reader_tokens, keys, query_stride_token, sequence, QUERY_KEY_SIZE, EVEN_KEY, DOT_DTYPE
        )
        result += tl.dot(scores.to(DOT_DTYPE), query_tile, input_precision=PRECISION)

    key_tile = load_rows(key, tokens, keys, key_stride_token, sequence, QUERY_KEY_SIZE, EVEN_KEY, tl.float32)
    product = tl.sum(key_tile * result, axis=1)
    rows = tl.num_programs(2)
    tl.store(key_products + (key_block.to(tl.int64) * rows + row) * sequence + tokens, product, mask=valid)
    pointers = key_gradient + tokens.to(tl.int64)[:, None] * result_stride_token + keys[None, :]
    tl.store(pointers, result.to(key_gradient.dtype.element_ty), mask=valid[:, None] & key_mask[None, :])


@triton.jit
def value_gradient_kernel(
    query, key, output_gradient, decay, log_input, stabilizer, inverse_divisor,
    documents, boundary, state_gradients, value_gradient,
    query_stride_batch, query_stride_token, query_stride_head,
    key_stride_batch, key_stride_token, key_stride_head,
    gradient_stride_batch, gradient_stride_token, gradient_stride_head,
    result_stride_batch, result_stride_token, result_stride_head,
    sequence, heads, num_chunks, scale,
    QUERY_KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, EVEN_KEY: tl.constexpr, EVEN_VALUE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of one tile of tokens and one block of columns. Grid: (value blocks, tiles, batch * heads)."""
    tile = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    batch = row // heads
    head = row % heads
    query += batch * query_stride_batch + head * query_stride_head
    key += batch * key_stride_batch + head * key_stride_head
    output_gradient += batch * gradient_stride_batch + head * gradient_stride_head
    value_gradient += batch * result_stride_batch + head * result_stride_head
    decay += row * sequence
    stabilizer += row * sequence
    inverse_divisor += row * sequence
    chunk = tile // (CHUNK // TILE)
    last = tl.minimum((chunk + 1) * CHUNK, sequence) - 1
    slot = row * (num_chunks + 1) + chunk + 1
    state_gradients += slot * (QUERY_KEY_SIZE * VALUE_SIZE)
    values = tl.program_id(0) * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    tokens = tile * TILE + tl.arange(0, TILE)
    valid = tokens < sequence
    offer = tl.load(log_input + row * sequence + tokens, mask=valid, other=0.0) - tl.load(
        decay + tokens, mask=valid, other=0.0
    )
    carry = tl.exp(tl.minimum(tl.load(decay + last) + offer - tl.load(boundary + slot), 0.0))
    if HAS_DOCUMENTS:
        documents += batch * sequence
        document = tl.load(documents + tokens, mask=valid, other=-1)
        carry = tl.where(document == tl.load(documents + last), carry, 0.0)

    # Through the state after the chunk: dv = dC^T k.
    result = tl.zeros((TILE, BLOCK_VALUE), dtype=tl.float32)
    for start in range(0, QUERY_KEY_SIZE, BLOCK_KEY):
        keys = start + tl.arange(0, BLOCK_KEY)
        key_tile = load_rows(key, tokens, keys, key_stride_token, sequence, QUERY_KEY_SIZE, EVEN_KEY, DOT_DTYPE)
        gradient = load_state(state_gradients, keys, values, QUERY_KEY_SIZE, VALUE_SIZE, EVEN_KEY and EVEN_VALUE)
        result += tl.dot(key_tile, gradient.to(DOT_DTYPE), input_precision=PRECISION)
    result = result * carry[:, None]

    # Through the outputs of the chunk, from the diagonal on.
    tiles_end = tl.minimum((chunk + 1) * (CHUNK // TILE), tl.cdiv(sequence, TILE))
    for reader in range(tile, tiles_end):
        reader_tokens = reader * TILE + tl.arange(0, TILE)
        reader_valid = reader_tokens < sequence
        reach = tl.load(decay + reader_tokens, mask=reader_valid, other=0.0) - tl.load(
            stabilizer + reader_tokens, mask=reader_valid, other=0.0
        )
        inverse = tl.load(inverse_divisor + reader_tokens, mask=reader_valid, other=0.0)
        scores = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, QUERY_KEY_SIZE, BLOCK_KEY):
            keys = start + tl.arange(0, BLOCK_KEY)
            key_tile = load_rows(key, tokens, keys, key_stride_token, sequence, QUERY_KEY_SIZE, EVEN_KEY, DOT_DTYPE)
            query_tile = load_columns(
                query, reader_tokens, keys, query_stride_token, sequence, QUERY_KEY_SIZE, EVEN_KEY, DOT_DTYPE
            )
            scores += tl.dot(key_tile, query_tile, input_precision=PRECISION)
        related = (tokens[:, None] <= reader_tokens[None, :]) & reader_valid[None, :]
        if HAS_DOCUMENTS:
            reader_document = tl.load(documents + reader_tokens, mask=reader_valid, other=-2)
            related = related & (document[:, None] == reader_document[None, :])
        weight = tl.exp(tl.minimum(reach[None, :] + offer[:, None], 0.0)) * scale
        scores = tl.where(related, scores * weight * inverse[None, :], 0.0)
        gradient_tile = load_rows(
            output_gradient, reader_tokens, values, gradient_stride_token, sequence, VALUE_SIZE, EVEN_VALUE,
            DOT_DTYPE,
        )  # fmt: skip
        result += tl.dot(scores.to(DOT_DTYPE), gradient_tile, input_precision=PRECISION)

    result_mask = valid[:, None] & (values < VALUE_SIZE)[None, :]
    pointers = value_gradient + tokens.to(tl.int64)[:, None] * result_stride_token + values[None, :]
    tl.store(pointers, result.to(value_gradient.dtype.element_ty), mask=result_mask)
