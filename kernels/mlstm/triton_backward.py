"""Triton kernels of the chunkwise mLSTM, backward pass.

With the running maxima m given, the output is h = N / (max(|d|, exp(-m)) + epsilon), where the numerator
N = C^T q and the denominator d = n.q are linear in the scaled query, in every key (and value) and in the
state before the chunk. The gradients of N and d are therefore carried back exactly as the forward pass
carries C and n forward: with the same decays, through the same chunk boundaries.

1. `output_gradient_kernel`: from dh and h, the per-token scalars that everything else needs.
2. `state_gradient_kernel`: the gradient of the state after every chunk, a recurrence from the last chunk to
   the first, and the inner product <C, dC> + <n, dn> at every boundary.
3. The gradients of queries, keys and values, for all chunks at once: `triton_backward_tokens`.
4. `forget_gradient_kernel`: the gradient of the log forget gates with m held fixed. The gate of token r
   scales every contribution from a source before r to a reader at or after r. Those inside the chunk are
   sum_{t >= r} (<q_t, dq_t> - <k_t, dk_t>), those that leave the chunk are <C, dC> + <n, dn> at its end.
   Anchoring at the chunk's end keeps rounding errors from adding up over the sequence.

What m itself contributes is `output_gradient_kernel`'s `stabilizer_gradient`; see `chunkwise_triton` for how
it is routed. Layouts are those of `triton_forward`.
"""

import triton
import triton.language as tl

from kernels.tiles import document_before, load_columns, load_rows, load_state, store_state


@triton.jit
def output_gradient_kernel(
    output, output_gradient, denominator, stabilizer,
    inverse_divisor, denominator_gradient, query_product, stabilizer_gradient,
    output_stride_batch, output_stride_token, output_stride_head,
    gradient_stride_batch, gradient_stride_token, gradient_stride_head,
    sequence, heads, epsilon,
    VALUE_SIZE: tl.constexpr, TILE: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Per-token scalars of the division. With Z = max(|d|, exp(-m)) + epsilon:

    inverse_divisor 1 / Z; denominator_gradient dL/dd; query_product <q, dq> = <N, dN> + d dd, without going
    through q; stabilizer_gradient dL/dm with N and d held fixed in unstabilised terms, -<dh, h> epsilon / Z.
    Grid: (tiles, batch * heads).
    """
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1).to(tl.int64)
    batch = row // heads
    head = row % heads
    output += batch * output_stride_batch + head * output_stride_head
    output_gradient += batch * gradient_stride_batch + head * gradient_stride_head
    product = tl.zeros((TILE,), dtype=tl.float32)
    for start in range(0, VALUE_SIZE, BLOCK_VALUE):
        columns = start + tl.arange(0, BLOCK_VALUE)
        h = load_rows(output, tokens, columns, output_stride_token, sequence, VALUE_SIZE, False, tl.float32)
        dh = load_rows(output_gradient, tokens, columns, gradient_stride_token, sequence, VALUE_SIZE, False, tl.float32)
        product += tl.sum(h * dh, axis=1)
    valid = tokens < sequence
    gates = row * sequence + tokens
    total = tl.load(denominator + gates, mask=valid, other=0.0)
    floor = tl.exp(-tl.load(stabilizer + gates, mask=valid, other=0.0))
    inverse = 1.0 / (tl.maximum(tl.abs(total), floor) + epsilon)
    slope = tl.where(tl.abs(total) > floor, tl.where(total < 0.0, -1.0, 1.0), 0.0)
    total_gradient = -product * inverse * slope
    tl.store(inverse_divisor + gates, inverse, mask=valid)
    tl.store(denominator_gradient + gates, total_gradient, mask=valid)
    tl.store(query_product + gates, product + total * total_gradient, mask=valid)
    tl.store(stabilizer_gradient + gates, -product * epsilon * inverse, mask=valid)


@triton.jit
def state_gradient_kernel(
    query, output_gradient, decay, stabilizer, inverse_divisor, denominator_gradient, documents, boundary,
    states, normalizers, state_gradients, normalizer_gradients, inner_products,
    query_stride_batch, query_stride_token, query_stride_head,
    gradient_stride_batch, gradient_stride_token, gradient_stride_head,
    sequence, heads, num_chunks, scale,
    QUERY_KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, EVEN_KEY: tl.constexpr, EVEN_VALUE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state at every chunk boundary, in the stabilisation of that boundary.

    The last slot of `state_gradients` and `normalizer_gradients` holds the gradient of the final state on
    entry; the kernel fills the rest, down to the gradient of the initial state in slot 0. `inner_products`
    (batch * heads, num_chunks + 1, blocks) receives the part of <C, dC> + <n, dn> of each block.
    Grid: (key blocks, value blocks, batch * heads).
    """
    key_block = tl.program_id(0)
    value_block = tl.program_id(1)
    blocks = tl.num_programs(0) * tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    batch = row // heads
    head = row % heads
    query += batch * query_stride_batch + head * query_stride_head
    output_gradient += batch * gradient_stride_batch + head * gradient_stride_head
    decay += row * sequence
    stabilizer += row * sequence
    inverse_divisor += row * sequence
    denominator_gradient += row * sequence
    boundary += row * (num_chunks + 1)
    slot = row * (num_chunks + 1) + num_chunks
    states += slot * (QUERY_KEY_SIZE * VALUE_SIZE)
    state_gradients += slot * (QUERY_KEY_SIZE * VALUE_SIZE)
    normalizers += slot * QUERY_KEY_SIZE
    normalizer_gradients += slot * QUERY_KEY_SIZE
    inner_products += slot * blocks + key_block * tl.num_programs(1) + value_block
    if HAS_DOCUMENTS:
        documents += batch * sequence
    keys = key_block * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    values = value_block * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    key_mask = keys < QUERY_KEY_SIZE
    EVEN: tl.constexpr = EVEN_KEY and EVEN_VALUE
    gradient = load_state(state_gradients, keys, values, QUERY_KEY_SIZE, VALUE_SIZE, EVEN)
    normalizer_gradient = tl.load(normalizer_gradients + keys, mask=key_mask, other=0.0)
    stabilizer_after = tl.load(boundary + num_chunks)
    # Only the first value block accounts for the normalizer, which has no value columns.
    owns_normalizer = tl.where(value_block == 0, 1.0, 0.0)
    for step in range(num_chunks):
        state = load_state(states, keys, values, QUERY_KEY_SIZE, VALUE_SIZE, EVEN)
        normalizer = tl.load(normalizers + keys, mask=key_mask, other=0.0) * owns_normalizer
        product = tl.sum(tl.sum(state * gradient, axis=1) + normalizer * normalizer_gradient, axis=0)
        tl.store(inner_products, product)
        chunk = num_chunks - 1 - step
        last = tl.minimum((chunk + 1) * CHUNK, sequence) - 1
        stabilizer_before = tl.load(boundary + chunk)
        keep = tl.exp(tl.minimum(tl.load(decay + last) + stabilizer_before - stabilizer_after, 0.0))
        if HAS_DOCUMENTS:
            first_document = document_before(documents, chunk, CHUNK)
            keep = tl.where(tl.load(documents + last) == first_document, keep, 0.0)
        gradient = gradient * keep
        normalizer_gradient = normalizer_gradient * keep
        for tile in range(0, CHUNK // TILE):
            tokens = chunk * CHUNK + tile * TILE + tl.arange(0, TILE)
            valid = tokens < sequence
            reach = tl.load(decay + tokens, mask=valid, other=0.0) - tl.load(stabilizer + tokens, mask=valid, other=0.0)
            carry = tl.exp(tl.minimum(reach + stabilizer_before, 0.0)) * scale
            if HAS_DOCUMENTS:
                document = tl.load(documents + tokens, mask=valid, other=-1)
                carry = tl.where(document == first_document, carry, 0.0)
            inverse = tl.load(inverse_divisor + tokens, mask=valid, other=0.0)
            total_gradient = tl.load(denominator_gradient + tokens, mask=valid, other=0.0)
            query_tile = load_columns(
                query, tokens, keys, query_stride_token, sequence, QUERY_KEY_SIZE, EVEN_KEY, tl.float32
            )
            gradient_tile = load_rows(
                output_gradient, tokens, values, gradient_stride_token, sequence, VALUE_SIZE, EVEN_VALUE,
                DOT_DTYPE,
            )  # fmt: skip
            weighted = query_tile * (carry * inverse)[None, :]
            gradient += tl.dot(weighted.to(DOT_DTYPE), gradient_tile, input_precision=PRECISION)
            normalizer_gradient += tl.sum(query_tile * (carry * total_gradient)[None, :], axis=1)
        stabilizer_after = stabilizer_before
        states -= QUERY_KEY_SIZE * VALUE_SIZE
        state_gradients -= QUERY_KEY_SIZE * VALUE_SIZE
        normalizers -= QUERY_KEY_SIZE
        normalizer_gradients -= QUERY_KEY_SIZE
        inner_products -= blocks
        store_state(state_gradients, gradient, keys, values, QUERY_KEY_SIZE, VALUE_SIZE, EVEN)
        if value_block == 0:
            tl.store(normalizer_gradients + keys, normalizer_gradient, mask=key_mask)
    state = load_state(states, keys, values, QUERY_KEY_SIZE, VALUE_SIZE, EVEN)
    normalizer = tl.load(normalizers + keys, mask=key_mask, other=0.0) * owns_normalizer
    product = tl.sum(tl.sum(state * gradient, axis=1) + normalizer * normalizer_gradient, axis=0)
    tl.store(inner_products, product)


@triton.jit
def forget_gradient_kernel(
    token_products, chunk_products, documents, forget_gradient,
    sequence, heads, num_chunks,
    CHUNK: tl.constexpr, TILE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Gradient of the log forget gates, the stabilizer held fixed.

    `token_products` (batch * heads, sequence) is <q, dq> - <k, dk>; `chunk_products`
    (batch * heads, num_chunks + 1) is <C, dC> + <n, dn> at the boundaries. Each gate receives the sum of
    both from itself to the end of its chunk, within its document. Grid: (num_chunks, batch * heads).
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token_products += row * sequence
    forget_gradient += row * sequence
    positions = tl.arange(0, TILE)
    carried = tl.load(chunk_products + row * (num_chunks + 1) + chunk + 1)
    if HAS_DOCUMENTS:
        documents += (row // heads) * sequence
        carried_document = tl.load(documents + tl.minimum((chunk + 1) * CHUNK, sequence) - 1)
    for step in range(0, CHUNK // TILE):
        tokens = chunk * CHUNK + (CHUNK // TILE - 1 - step) * TILE + positions
        valid = tokens < sequence
        product = tl.load(token_products + tokens, mask=valid, other=0.0)
        related = positions[None, :] >= positions[:, None]
        if HAS_DOCUMENTS:
            # Past the end of the sequence the last document goes on, so that the carried sum passes through.
            document = tl.load(documents + tl.minimum(tokens, sequence - 1))
            related = related & (document[:, None] == document[None, :])
        result = tl.sum(tl.where(related, product[None, :], 0.0), axis=1)
        if HAS_DOCUMENTS:
            result = tl.where(document == carried_document, result + carried, result)
            carried_document = tl.sum(tl.where(positions == 0, document, 0), axis=0)
        else:
            result = result + carried
        tl.store(forget_gradient + tokens, result, mask=valid)
        carried = tl.sum(tl.where(positions == 0, result, 0.0), axis=0)
