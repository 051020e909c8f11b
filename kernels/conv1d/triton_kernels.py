"""Triton kernels of the causal convolution.

A program has a tile of tokens and channels of one sequence. Inputs, outputs and gradients are read and written in
place through their strides, channels contiguous; the state is (batch, WIDTH - 1, channels), contiguous, fp32, and the
weight is transposed, (WIDTH, channels), fp32. Each tap is a tile of its own, shifted by some tokens: all but the first
come from the cache.

`since` is (batch, sequence) int32: how many tokens of its document came before each token, or more than WIDTH where it
began before the sequence. A tap that reaches further back than that counts as zero.
"""

import triton
import triton.language as tl


@triton.jit
def conv1d_load_tap(
    inputs, state, first, local, back, columns, stride_token, sequence, channels, WIDTH: tl.constexpr,
):  # fmt: skip
    """Inputs `back` tokens before the tokens `first + local`, fp32; before the sequence from the state.

    `inputs` points at the token `first` of a sequence, `state` at that sequence's state.
    """
    rows = first + local - back
    inside = columns < channels
    mask = ((rows >= 0) & (rows < sequence))[:, None] & inside[None, :]
    tile = tl.load(inputs + (local - back)[:, None] * stride_token + columns[None, :], mask=mask, other=0.0)
    tile = tile.to(tl.float32)
    if first < WIDTH - 1:
        mask = ((rows < 0) & (rows >= 1 - WIDTH))[:, None] & inside[None, :]
        tile += tl.load(state + (rows + WIDTH - 1)[:, None] * channels + columns[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def conv1d_sums(
    inputs, weight, bias, state, since, first, local, columns, stride_token, sequence, channels,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """What the activation takes, a tile in fp32; `since` holds that of the tile's tokens."""
    inside = columns < channels
    sums = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        tile = conv1d_load_tap(
            inputs, state, first, local, WIDTH - 1 - tap, columns, stride_token, sequence, channels, WIDTH
        )
        if HAS_DOCUMENTS:
            tile = tl.where((since >= WIDTH - 1 - tap)[:, None], tile, 0.0)
        sums += tile * tl.load(weight + tap * channels + columns, mask=inside, other=0.0)[None, :]
    return sums


@triton.jit
def conv1d_forward_kernel(
    inputs, weight, bias, state, since, outputs,
    input_stride_batch, input_stride_token, output_stride_batch, output_stride_token,
    sequence, channels,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Outputs. Grid: (channel blocks, token blocks, batch)."""
    columns = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first = tl.program_id(1) * BLOCK_TOKENS
    start = first.to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    local = tl.arange(0, BLOCK_TOKENS)
    valid = first + local < sequence
    before = local
    if HAS_DOCUMENTS:
        before = tl.load(since + row * sequence + start + local, mask=valid, other=0)
    sums = conv1d_sums(
        inputs + row * input_stride_batch + start * input_stride_token, weight, bias,
        state + row * (WIDTH - 1) * channels, before, first, local, columns, input_stride_token, sequence, channels,
        WIDTH, HAS_BIAS, HAS_DOCUMENTS, BLOCK_TOKENS, BLOCK_CHANNELS,
    )  # fmt: skip
    if SILU:
        sums = sums / (1.0 + tl.exp(-sums))
    tl.store(
        outputs + row * output_stride_batch + start * output_stride_token
        + local[:, None] * output_stride_token + columns[None, :],
        sums.to(outputs.dtype.element_ty), mask=valid[:, None] & (columns < channels)[None, :],
    )  # fmt: skip


@triton.jit
def conv1d_weight_gradient_kernel(
    inputs, weight, bias, state, since, output_gradient, sum_gradient, partial,
    input_stride_batch, input_stride_token, gradient_stride_batch, gradient_stride_token,
    sum_stride_batch, sum_stride_token, sequence, channels, token_blocks,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of the sums before the activation, where there is one, and partial sums of those of the weight.

    A program reads TILES tiles, one after the other, and writes WIDTH + 1 rows of `partial`, (batch, token blocks,
    WIDTH + 1, channels): the taps, then the bias. ROWS is the next power of two. Grid as in the forward pass.
    """
    columns = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = columns < channels
    block = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first = block * (BLOCK_TOKENS * TILES)
    start = first.to(tl.int64)
    inputs += row * input_stride_batch + start * input_stride_token
    output_gradient += row * gradient_stride_batch + start * gradient_stride_token
    state += row * (WIDTH - 1) * channels
    taps = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_CHANNELS), tl.float32)
    for tile in range(TILES):
        local = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        valid = first + local < sequence
        mask = valid[:, None] & inside[None, :]
        before = local
        if HAS_DOCUMENTS:
            before = tl.load(since + row * sequence + start + local, mask=valid, other=0)
        gradient = tl.load(
            output_gradient + local[:, None] * gradient_stride_token + columns[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        if SILU:
            sums = conv1d_sums(
                inputs, weight, bias, state, before, first, local, columns, input_stride_token, sequence, channels,
                WIDTH, HAS_BIAS, HAS_DOCUMENTS, BLOCK_TOKENS, BLOCK_CHANNELS,
            )  # fmt: skip
            gate = 1.0 / (1.0 + tl.exp(-sums))
            gradient = gradient * gate * (1.0 + sums * (1.0 - gate))
            tl.store(
                sum_gradient + row * sum_stride_batch + start * sum_stride_token
                + local[:, None] * sum_stride_token + columns[None, :],
                gradient, mask=mask,
            )  # fmt: skip
        for tap in tl.static_range(WIDTH):
            read = conv1d_load_tap(
                inputs, state, first, local, WIDTH - 1 - tap, columns, input_stride_token, sequence, channels, WIDTH
            )
            if HAS_DOCUMENTS:
                read = tl.where((before >= WIDTH - 1 - tap)[:, None], read, 0.0)
            total += tl.where((taps == tap)[:, None], tl.sum(read * gradient, axis=0)[None, :], 0.0)
        if HAS_BIAS:
            total += tl.where((taps == WIDTH)[:, None], tl.sum(gradient, axis=0)[None, :], 0.0)
    partial += (row * token_blocks + block) * (WIDTH + 1) * channels
    mask = (taps <= WIDTH)[:, None] & inside[None, :]
    tl.store(partial + taps[:, None] * channels + columns[None, :], total, mask=mask)


@triton.jit
def conv1d_input_gradient_kernel(
    gradient, weight, since, final_gradient, input_gradient, state_gradient,
    gradient_stride_batch, gradient_stride_token, input_stride_batch, input_stride_token,
    sequence, channels,
    WIDTH: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs and, for the WIDTH - 1 rows before them, of the state.

    `gradient` is that of the sums before the activation. Row `first + local` of the state and the inputs joined is
    tap `tap` of the token that many rows further on. Grid: (channel blocks, blocks of joined rows, batch).
    """
    columns = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = columns < channels
    first = tl.program_id(1) * BLOCK_TOKENS
    start = first.to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    local = tl.arange(0, BLOCK_TOKENS)
    gradient += row * gradient_stride_batch + start * gradient_stride_token
    since += row * sequence
    total = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), tl.float32)
    for tap in tl.static_range(WIDTH):
        token = first + local - tap
        reads = (token >= 0) & (token < sequence)
        if HAS_DOCUMENTS:
            reads = reads & (tl.load(since + token, mask=reads, other=0) >= WIDTH - 1 - tap)
        tile = tl.load(
            gradient + (local - tap)[:, None] * gradient_stride_token + columns[None, :],
            mask=reads[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        total += tile * tl.load(weight + tap * channels + columns, mask=inside, other=0.0)[None, :]
    joined = first + local
    if first + BLOCK_TOKENS > sequence:
        last = (joined >= sequence) & (joined < sequence + WIDTH - 1)
        if HAS_DOCUMENTS:
            last = last & (sequence + WIDTH - 2 - joined <= tl.load(since + sequence - 1))
        total += tl.load(
            final_gradient + row * (WIDTH - 1) * channels + (joined - sequence)[:, None] * channels + columns[None, :],
            mask=last[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
    is_input = (joined >= WIDTH - 1) & (joined < sequence + WIDTH - 1)
    tl.store(
        input_gradient + row * input_stride_batch + start * input_stride_token
        + (local - (WIDTH - 1))[:, None] * input_stride_token + columns[None, :],
        total.to(input_gradient.dtype.element_ty), mask=is_input[:, None] & inside[None, :],
    )  # fmt: skip
    if first < WIDTH - 1:
        tl.store(
            state_gradient + row * (WIDTH - 1) * channels + joined[:, None] * channels + columns[None, :],
            total, mask=(joined < WIDTH - 1)[:, None] & inside[None, :],
        )  # fmt: skip
