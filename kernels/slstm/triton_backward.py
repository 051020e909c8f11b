"""Triton kernels of the sLSTM, backward pass: from the last token to the first, programs and layouts as forward.

The gradient of a token's hidden state is the output's plus that of the next token's gates times the recurrent
matrices. As forward, `slstm_backward_resident_kernel` keeps the matrices and what it carries in registers or shared
memory, and `slstm_backward_tiled_kernel` reads the matrices tile by tile and exchanges the gradients of the gates
through global memory.

`raw_gradients` is (batch, sequence + 1, 4, heads, size), its last token zero on entry; `through_mean` and
`negative_logarithm` are (batch, heads, size) float32, gradients of the final state on entry (the logarithm's
negated) and of the initial state on return; `weights` is (heads, 4, size, size) with a row for each channel of the
gate. The gradient of the stabilizer goes to the gates of its `source` and after.
"""

import triton
import triton.language as tl


@triton.jit
def slstm_cell_gradient(
    saved, means, columns, mask, token_width, hidden, through_mean, negative_logarithm, through_maximum, setter, token
):
    """Gradients of the four gates of a token, and of the mean and (negated) the logarithm before it.

    `hidden` is the whole gradient of the hidden state, `through_mean` and `negative_logarithm` those of the state
    after the token. `saved`, `means` (that of the token before) and `columns` add up to pointers.
    """
    weight = tl.load(saved + columns, mask=mask, other=0.0)
    suppressed = tl.load(saved + token_width + columns, mask=mask, other=0.0)
    candidate = tl.load(saved + 2 * token_width + columns, mask=mask, other=0.0)
    output = tl.load(saved + 3 * token_width + columns, mask=mask, other=0.0)
    previous = tl.load(means + columns, mask=mask, other=0.0)
    mean = tl.load(means + token_width + columns, mask=mask, other=0.0)
    keep = 1.0 - weight
    of_mean = through_mean + hidden * output
    of_difference = of_mean * ((candidate - previous) * weight * keep) + negative_logarithm * keep
    to_input = of_difference - negative_logarithm + tl.where(setter == token, through_maximum, 0.0)
    to_forget = suppressed * (tl.where(token > setter, through_maximum, 0.0) - of_difference)
    to_candidate = of_mean * (weight * (1.0 - candidate * candidate))
    to_output = hidden * (mean * output * (1.0 - output))
    return to_input, to_forget, to_candidate, to_output, of_mean * keep, of_difference


@triton.jit
def slstm_backward_resident_kernel(
    output_gradient, weights, starts, means, saved, source, stabilizer_gradient, raw_gradients, through_mean,
    negative_logarithm,
    gradient_stride_batch, gradient_stride_token, gradient_stride_head,
    batch, sequence, heads,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Heads of at most BLOCK channels. Grid: (blocks of ROWS sequences, heads)."""
    sequences = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK)[None, :]
    rows = sequences.to(tl.int64)[:, None]
    valid = sequences < batch
    mask = valid[:, None] & (columns < SIZE)
    token_width = heads * SIZE

    inner = tl.arange(0, BLOCK)[:, None]
    matrix = (inner < SIZE) & (columns < SIZE)
    weights += head.to(tl.int64) * (4 * SIZE * SIZE) + inner * SIZE + columns
    input_weights = tl.load(weights, mask=matrix, other=0.0).to(DOT_DTYPE)
    forget_weights = tl.load(weights + SIZE * SIZE, mask=matrix, other=0.0).to(DOT_DTYPE)
    candidate_weights = tl.load(weights + 2 * SIZE * SIZE, mask=matrix, other=0.0).to(DOT_DTYPE)
    output_weights = tl.load(weights + 3 * SIZE * SIZE, mask=matrix, other=0.0).to(DOT_DTYPE)

    channels = head * SIZE + columns
    carried = rows * token_width + channels
    of_mean = tl.load(through_mean + carried, mask=mask, other=0.0)
    of_logarithm = tl.load(negative_logarithm + carried, mask=mask, other=0.0)
    through_maximum = tl.load(stabilizer_gradient + carried, mask=mask, other=0.0)
    setter = tl.load(source + carried, mask=mask, other=-1)
    last = tl.zeros_like(rows) + (sequence - 1)
    output_gradient += rows * gradient_stride_batch + head.to(tl.int64) * gradient_stride_head + columns
    output_gradient += last * gradient_stride_token
    means += (rows * (sequence + 1) + last) * token_width
    saved += (rows * sequence + last) * (4 * token_width)
    raw_gradients += (rows * (sequence + 1) + last) * (4 * token_width) + channels
    starts += sequences.to(tl.int64) * sequence + (sequence - 1)
    recurrent = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(sequence):
        hidden = recurrent + tl.load(output_gradient, mask=mask, other=0.0).to(tl.float32)
        to_input, to_forget, to_candidate, to_output, of_mean, of_logarithm = slstm_cell_gradient(
            saved, means, channels, mask, token_width, hidden, of_mean, of_logarithm, through_maximum, setter,
            sequence - 1 - step,
        )  # fmt: skip
        stored = raw_gradients.dtype.element_ty
        tl.store(raw_gradients, to_input.to(stored), mask=mask)
        tl.store(raw_gradients + token_width, to_forget.to(stored), mask=mask)
        tl.store(raw_gradients + 2 * token_width, to_candidate.to(stored), mask=mask)
        tl.store(raw_gradients + 3 * token_width, to_output.to(stored), mask=mask)
        recurrent = tl.dot(to_input.to(DOT_DTYPE), input_weights, input_precision=PRECISION)
        recurrent += tl.dot(to_forget.to(DOT_DTYPE), forget_weights, input_precision=PRECISION)
        recurrent += tl.dot(to_candidate.to(DOT_DTYPE), candidate_weights, input_precision=PRECISION)
        recurrent += tl.dot(to_output.to(DOT_DTYPE), output_weights, input_precision=PRECISION)
        if HAS_DOCUMENTS:
            begins = tl.load(starts, mask=valid, other=0)[:, None] != 0
            recurrent = tl.where(begins, 0.0, recurrent)
            starts -= 1
        output_gradient -= gradient_stride_token
        means -= token_width
        saved -= 4 * token_width
        raw_gradients -= 4 * token_width
    tl.store(through_mean + carried, of_mean, mask=mask)
    tl.store(negative_logarithm + carried, of_logarithm, mask=mask)


@triton.jit
def slstm_backward_tiled_kernel(
    output_gradient, weights, starts, means, saved, source, stabilizer_gradient, raw_gradients, through_mean,
    negative_logarithm,
    gradient_stride_batch, gradient_stride_token, gradient_stride_head,
    batch, sequence, heads,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_INNER: tl.constexpr, ROWS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Heads of any size, BLOCK channels at a time. Grid: (blocks of ROWS sequences, heads)."""
    sequences = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    rows = sequences.to(tl.int64)[:, None]
    valid = sequences < batch
    token_width = heads * SIZE
    matrix_size: tl.constexpr = SIZE * SIZE
    weights += head.to(tl.int64) * (4 * matrix_size)
    carried = rows * token_width + head * SIZE
    last = tl.zeros_like(rows) + (sequence - 1)
    output_gradient += rows * gradient_stride_batch + head.to(tl.int64) * gradient_stride_head
    output_gradient += last * gradient_stride_token
    means += (rows * (sequence + 1) + last) * token_width + head * SIZE
    saved += (rows * sequence + last) * (4 * token_width) + head * SIZE
    raw_gradients += (rows * (sequence + 1) + last) * (4 * token_width) + head * SIZE
    starts += sequences.to(tl.int64) * sequence + (sequence - 1)
    begins = tl.zeros((ROWS, 1), dtype=tl.int1)
    for step in range(sequence):
        for first in range(0, SIZE, BLOCK):
            columns = first + tl.arange(0, BLOCK)[None, :]
            mask = valid[:, None] & (columns < SIZE)
            hidden = tl.load(output_gradient + columns, mask=mask, other=0.0).to(tl.float32)
            for gate in range(4):
                later = raw_gradients + 4 * token_width + gate * token_width
                for start in range(0, SIZE, BLOCK_INNER):
                    inner = start + tl.arange(0, BLOCK_INNER)
                    read = valid[:, None] & (inner < SIZE)[None, :]
                    if HAS_DOCUMENTS:
                        read = read & ~begins
                    operand = tl.load(later + inner[None, :], mask=read, other=0.0).to(DOT_DTYPE)
                    matrix = (inner < SIZE)[:, None] & (columns < SIZE)
                    part = tl.load(
                        weights + gate * matrix_size + inner[:, None] * SIZE + columns, mask=matrix, other=0.0
                    )
                    hidden += tl.dot(operand, part.to(DOT_DTYPE), input_precision=PRECISION)
            of_mean = tl.load(through_mean + carried + columns, mask=mask, other=0.0)
            of_logarithm = tl.load(negative_logarithm + carried + columns, mask=mask, other=0.0)
            through_maximum = tl.load(stabilizer_gradient + carried + columns, mask=mask, other=0.0)
            setter = tl.load(source + carried + columns, mask=mask, other=-1)
            to_input, to_forget, to_candidate, to_output, of_mean, of_logarithm = slstm_cell_gradient(
                saved, means, columns, mask, token_width, hidden, of_mean, of_logarithm, through_maximum, setter,
                sequence - 1 - step,
            )  # fmt: skip
            stored = raw_gradients.dtype.element_ty
            own = raw_gradients + columns
            tl.store(own, to_input.to(stored), mask=mask)
            tl.store(own + token_width, to_forget.to(stored), mask=mask)
            tl.store(own + 2 * token_width, to_candidate.to(stored), mask=mask)
            tl.store(own + 3 * token_width, to_output.to(stored), mask=mask)
            tl.store(through_mean + carried + columns, of_mean, mask=mask)
            tl.store(negative_logarithm + carried + columns, of_logarithm, mask=mask)
        # The step before reads what other threads of this program have just written.
        tl.debug_barrier()
        if HAS_DOCUMENTS:
            begins = tl.load(starts, mask=valid, other=0)[:, None] != 0
            starts -= 1
        output_gradient -= gradient_stride_token
        means -= token_width
        saved -= 4 * token_width
        raw_gradients -= 4 * token_width
