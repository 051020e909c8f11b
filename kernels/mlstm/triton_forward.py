"""Triton kernels of the chunkwise mLSTM, forward pass.

The sequence is cut into chunks. Four kernels do the work:

1. `gate_scan_kernel`: for every chunk at once, the log of the forget gate accumulated since the start of the
   chunk (or of the document, if one starts inside), and the running maximum without the carried state.
2. `boundary_scan_kernel`: the running maximum at every chunk boundary, a scalar recurrence over chunks.
3. `state_kernel`: the state (C, n) before every chunk, a recurrence over chunks, written in fp32.
4. `output_kernel`: the outputs, for all chunks at once, from the state before the chunk and the inside of it.

Layouts: per-token gate quantities are fp32, contiguous, (batch * heads, sequence); queries, keys, values and
outputs are read and written in place through their strides, as (batch, sequence, heads, size) with a last
stride of one; states are (batch * heads, num_chunks + 1, query_key_size, value_size), fp32.

Every exponent is at most zero in exact arithmetic, because the running maximum m is one of the terms it
bounds; a minimum with zero removes what rounding may add.
"""

import triton
import triton.language as tl

from kernels.tiles import document_before, load_columns, load_rows, load_state, store_state


@triton.jit
def gate_scan_kernel(
    log_forget, log_input, documents, decay, local_stabilizer,
    sequence, heads,
    CHUNK: tl.constexpr, TILE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Accumulated log forget gate and running maximum inside each chunk.

    `decay[t]` is the sum of the log forget gates from the start of the chunk, or of the document where that
    is later, up to and including t. `local_stabilizer[t]` is the running maximum over what is inside the
    chunk: the inputs and, after a document start, the stabilizer 0 that the document starts from.
    Grid: (num_chunks, batch * heads).
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    gates = row * sequence
    positions = tl.arange(0, TILE)
    carried_decay = 0.0
    carried_maximum = -float("inf")
    if HAS_DOCUMENTS:
        documents += (row // heads) * sequence
        first_document = document_before(documents, chunk, CHUNK)
        carried_document = first_document
    for tile in range(0, CHUNK // TILE):
        tokens = chunk * CHUNK + tile * TILE + positions
        valid = tokens < sequence
        forget = tl.load(log_forget + gates + tokens, mask=valid, other=0.0)
        gate = tl.load(log_input + gates + tokens, mask=valid, other=-float("inf"))
        related = positions[None, :] <= positions[:, None]
        if HAS_DOCUMENTS:
            document = tl.load(documents + tokens, mask=valid, other=-1)
            related = related & (document[:, None] == document[None, :])
        inside = tl.sum(tl.where(related, forget[None, :], 0.0), axis=1)
        reach = inside[:, None] - inside[None, :] + gate[None, :]
        maximum = tl.max(tl.where(related, reach, -float("inf")), axis=1)
        if HAS_DOCUMENTS:
            continues = document == carried_document
            maximum = tl.where(continues, tl.maximum(maximum, inside + carried_maximum), maximum)
            inside = tl.where(continues, inside + carried_decay, inside)
            maximum = tl.where(document == first_document, maximum, tl.maximum(maximum, inside))
            carried_document = tl.sum(tl.where(positions == TILE - 1, document, 0), axis=0)
        else:
            maximum = tl.maximum(maximum, inside + carried_maximum)
            inside = inside + carried_decay
        tl.store(decay + gates + tokens, inside, mask=valid)
        tl.store(local_stabilizer + gates + tokens, maximum, mask=valid)
        carried_decay = tl.sum(tl.where(positions == TILE - 1, inside, 0.0), axis=0)
        carried_maximum = tl.sum(tl.where(positions == TILE - 1, maximum, 0.0), axis=0)


@triton.jit
def boundary_scan_kernel(
    decay, local_stabilizer, documents, initial_stabilizer, boundary,
    sequence, heads, num_chunks,
    CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The stabilizer at every chunk boundary: `boundary[k]` before chunk k, the last one after the sequence.

    A plain recurrence: prefix sums of the decay over a whole long sequence would lose the small
    differences that decide the maximum. Grid: (batch * heads,).
    """
    row = tl.program_id(0).to(tl.int64)
    if HAS_DOCUMENTS:
        documents += (row // heads) * sequence
    stabilizer = tl.load(initial_stabilizer + row)
    tl.store(boundary + row * (num_chunks + 1), stabilizer)
    for chunk in range(num_chunks):
        last = tl.minimum((chunk + 1) * CHUNK, sequence) - 1
        carried = tl.load(decay + row * sequence + last) + stabilizer
        local = tl.load(local_stabilizer + row * sequence + last)
        stabilizer_next = tl.maximum(carried, local)
        if HAS_DOCUMENTS:
            continues = tl.load(documents + last) == document_before(documents, chunk, CHUNK)
            stabilizer_next = tl.where(continues, stabilizer_next, local)
        stabilizer = stabilizer_next
        tl.store(boundary + row * (num_chunks + 1) + chunk + 1, stabilizer)


@triton.jit
def state_kernel(
    key, value, decay, log_input, documents, boundary, states, normalizers,
    key_stride_batch, key_stride_token, key_stride_head,
    value_stride_batch, value_stride_token, value_stride_head,
    sequence, heads, num_chunks,
    QUERY_KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, EVEN_KEY: tl.constexpr, EVEN_VALUE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before every chunk and after the last.

    `states[:, 0]` and `normalizers[:, 0]` hold the initial state on entry; the kernel fills the rest. Each
    program carries one tile of C over all chunks; the programs of the first value block carry n as well.
    Grid: (key blocks, value blocks, batch * heads).
    """
    key_block = tl.program_id(0)
    value_block = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    batch = row // heads
    head = row % heads
    key += batch * key_stride_batch + head * key_stride_head
    value += batch * value_stride_batch + head * value_stride_head
    decay += row * sequence
    log_input += row * sequence
    boundary += row * (num_chunks + 1)
    states += row * (num_chunks + 1) * (QUERY_KEY_SIZE * VALUE_SIZE)
    normalizers += row * (num_chunks + 1) * QUERY_KEY_SIZE
    if HAS_DOCUMENTS:
        documents += batch * sequence
    keys = key_block * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    values = value_block * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    EVEN: tl.constexpr = EVEN_KEY and EVEN_VALUE
    state = load_state(states, keys, values, QUERY_KEY_SIZE, VALUE_SIZE, EVEN)
    normalizer = tl.load(normalizers + keys, mask=keys < QUERY_KEY_SIZE, other=0.0)
    stabilizer = tl.load(boundary)
    for chunk in range(num_chunks):
        last = tl.minimum((chunk + 1) * CHUNK, sequence) - 1
        last_decay = tl.load(decay + last)
        stabilizer_next = tl.load(boundary + chunk + 1)
        keep = tl.exp(tl.minimum(last_decay + stabilizer - stabilizer_next, 0.0))
        if HAS_DOCUMENTS:
            last_document = tl.load(documents + last)
            keep = tl.where(last_document == document_before(documents, chunk, CHUNK), keep, 0.0)
        state = state * keep
        normalizer = normalizer * keep
        for tile in range(0, CHUNK // TILE):
            tokens = chunk * CHUNK + tile * TILE + tl.arange(0, TILE)
            valid = tokens < sequence
            token_decay = tl.load(decay + tokens, mask=valid, other=0.0)
            gate = tl.load(log_input + tokens, mask=valid, other=-float("inf"))
            weight = tl.exp(tl.minimum(last_decay - token_decay + gate - stabilizer_next, 0.0))
            if HAS_DOCUMENTS:
                document = tl.load(documents + tokens, mask=valid, other=-1)
                weight = tl.where(document == last_document, weight, 0.0)
            key_tile = load_columns(key, tokens, keys, key_stride_token, sequence, QUERY_KEY_SIZE, EVEN_KEY, tl.float32)
            value_tile = load_rows(
                value, tokens, values, value_stride_token, sequence, VALUE_SIZE, EVEN_VALUE, DOT_DTYPE
            )
            weighted = key_tile * weight[None, :]
            state += tl.dot(weighted.to(DOT_DTYPE), value_tile, input_precision=PRECISION)
            normalizer += tl.sum(weighted, axis=1)
        stabilizer = stabilizer_next
        states += QUERY_KEY_SIZE * VALUE_SIZE
        normalizers += QUERY_KEY_SIZE
        store_state(states, state, keys, values, QUERY_KEY_SIZE, VALUE_SIZE, EVEN)
        if value_block == 0:
            tl.store(normalizers + keys, normalizer, mask=keys < QUERY_KEY_SIZE)


@triton.jit
def output_kernel(
    query, key, value, decay, log_input, stabilizer, documents, boundary, states, normalizers,
    output, denominator,
    query_stride_batch, query_stride_token, query_stride_head,
    key_stride_batch, key_stride_token, key_stride_head,
    value_stride_batch, value_stride_token, value_stride_head,
    output_stride_batch, output_stride_token, output_stride_head,
    sequence, heads, num_chunks, scale, epsilon,
    QUERY_KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, EVEN_KEY: tl.constexpr, EVEN_VALUE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs h and denominators n.q of one tile of tokens and one block of value columns.

    Grid: (value blocks, tiles, batch * heads).
    """
    value_block = tl.program_id(0)
    tile = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    batch = row // heads
    head = row % heads
    query += batch * query_stride_batch + head * query_stride_head
    key += batch * key_stride_batch + head * key_stride_head
    value += batch * value_stride_batch + head * value_stride_head
    output += batch * output_stride_batch + head * output_stride_head
    decay += row * sequence
    log_input += row * sequence
    chunk = tile // (CHUNK // TILE)
    states += (row * (num_chunks + 1) + chunk) * (QUERY_KEY_SIZE * VALUE_SIZE)
    normalizers += (row * (num_chunks + 1) + chunk) * QUERY_KEY_SIZE
    values = value_block * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    tokens = tile * TILE + tl.arange(0, TILE)
    valid = tokens < sequence
    token_stabilizer = tl.load(stabilizer + row * sequence + tokens, mask=valid, other=0.0)
    reach = tl.load(decay + tokens, mask=valid, other=0.0) - token_stabilizer
    carry = tl.exp(tl.minimum(reach + tl.load(boundary + row * (num_chunks + 1) + chunk), 0.0))
    if HAS_DOCUMENTS:
        documents += batch * sequence
        document = tl.load(documents + tokens, mask=valid, other=-1)
        carry = tl.where(document == document_before(documents, chunk, CHUNK), carry, 0.0)

    # What the state before the chunk contributes.
    numerator = tl.zeros((TILE, BLOCK_VALUE), dtype=tl.float32)
    total = tl.zeros((TILE,), dtype=tl.float32)
    for start in range(0, QUERY_KEY_SIZE, BLOCK_KEY):
        keys = start + tl.arange(0, BLOCK_KEY)
        query_tile = load_rows(query, tokens, keys, query_stride_token, sequence, QUERY_KEY_SIZE, EVEN_KEY, DOT_DTYPE)
        state = load_state(states, keys, values, QUERY_KEY_SIZE, VALUE_SIZE, EVEN_KEY and EVEN_VALUE).to(DOT_DTYPE)
        normalizer = tl.load(normalizers + keys, mask=keys < QUERY_KEY_SIZE, other=0.0)
        numerator += tl.dot(query_tile, state, input_precision=PRECISION)
        total += tl.sum(query_tile.to(tl.float32) * normalizer[None, :], axis=1)
    carry = carry * scale
    numerator = numerator * carry[:, None]
    total = total * carry

    # What the tokens of the chunk contribute, one tile after the other up to the diagonal.
    for source in range(chunk * (CHUNK // TILE), tile + 1):
        source_tokens = source * TILE + tl.arange(0, TILE)
        source_valid = source_tokens < sequence
        offer = tl.load(log_input + source_tokens, mask=source_valid, other=0.0) - tl.load(
            decay + source_tokens, mask=source_valid, other=0.0
        )
        scores = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, QUERY_KEY_SIZE, BLOCK_KEY):
            keys = start + tl.arange(0, BLOCK_KEY)
            query_tile = load_rows(
                query, tokens, keys, query_stride_token, sequence, QUERY_KEY_SIZE, EVEN_KEY, DOT_DTYPE
            )
            key_tile = load_columns(
                key, source_tokens, keys, key_stride_token, sequence, QUERY_KEY_SIZE, EVEN_KEY, DOT_DTYPE
            )
            scores += tl.dot(query_tile, key_tile, input_precision=PRECISION)
        related = (source_tokens[None, :] <= tokens[:, None]) & valid[:, None]
        if HAS_DOCUMENTS:
            source_document = tl.load(documents + source_tokens, mask=source_valid, other=-2)
            related = related & (document[:, None] == source_document[None, :])
        weight = tl.exp(tl.minimum(reach[:, None] + offer[None, :], 0.0))
        scores = tl.where(related, scores * weight * scale, 0.0)
        total += tl.sum(scores, axis=1)
        value_tile = load_rows(
            value, source_tokens, values, value_stride_token, sequence, VALUE_SIZE, EVEN_VALUE, DOT_DTYPE
        )
        numerator += tl.dot(scores.to(DOT_DTYPE), value_tile, input_precision=PRECISION)

    divisor = tl.maximum(tl.abs(total), tl.exp(-token_stabilizer)) + epsilon
    result = numerator / divisor[:, None]
    output_mask = valid[:, None]
    if not EVEN_VALUE:
        output_mask = output_mask & (values < VALUE_SIZE)[None, :]
    output_pointers = output + tokens.to(tl.int64)[:, None] * output_stride_token + values[None, :]
    tl.store(output_pointers, result.to(output.dtype.element_ty), mask=output_mask)
    if value_block == 0:
        tl.store(denominator + row * sequence + tokens, total, mask=valid)
