"""Triton kernels of the sLSTM, forward pass: sequential in time, one program per block of sequences and head.

`sequential_torch` explains the recurrence and its notation. A step multiplies the hidden states of 16 sequences (the
fewest rows that a matrix product of Triton takes) by the four recurrent matrices of the head.

* `slstm_forward_resident_kernel`: heads of at most one tile. The matrices and the state stay in registers or shared
  memory over the whole sequence.
* `slstm_forward_tiled_kernel`: larger heads. The matrices are read again at every step, tile by tile, from the L2
  cache; the hidden state goes through global memory, where the barrier that ends each step makes it visible to all
  threads of the program. No two programs share anything, so none waits for another.

Layouts: `hiddens` and `means` are (batch, sequence + 1, heads, size), whose first token is the initial state; `saved`
is (batch, sequence, 4, heads, size) float32 and holds for the backward pass the weight of the token, sigmoid(-f),
tanh(z) and sigmoid(o); `logarithm`, `stabilizer` and `source` are (batch, heads, size), initial state on entry and
final state on return; `weights` is (heads, 4, size, size) with a row for each channel of the hidden state. All of
these are contiguous, and `gates` has a last stride of one.
"""

import triton
import triton.language as tl


@triton.jit
def log_of_one_plus(x):
    """log(1 + x) for x >= 0, exact to rounding for small x too (Goldberg 1991, theorem 4)."""
    above = 1.0 + x
    lost = above == 1.0
    return tl.where(lost, x, tl.log(above) * (x / tl.where(lost, 1.0, above - 1.0)))


@triton.jit
def logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def slstm_cell(input_gate, forget_gate, candidate, output_gate, mean, logarithm, stabilizer, source, token):
    """One step: what is saved, the hidden state, and the next mean, logarithm, stabilizer and its source."""
    log_forget = tl.minimum(forget_gate, 0.0) - log_of_one_plus(tl.exp(-tl.abs(forget_gate)))
    decayed = logarithm + log_forget
    weight = logistic(input_gate - decayed)
    logarithm = tl.maximum(decayed, input_gate) + log_of_one_plus(tl.exp(-tl.abs(input_gate - decayed)))
    candidate = 2.0 * logistic(2.0 * candidate) - 1.0
    output = logistic(output_gate)
    mean = mean + weight * (candidate - mean)
    carried = stabilizer + log_forget
    source = tl.where(input_gate > carried, token, source)
    stabilizer = tl.maximum(carried, input_gate)
    return weight, logistic(-forget_gate), candidate, output, output * mean, mean, logarithm, stabilizer, source


@triton.jit
def store_step(
    saved, hiddens, means, rows, columns, mask, token_width, sequence,
    weight, suppressed, candidate, output, hidden, mean,
):  # fmt: skip
    """What one step leaves for the backward pass; `rows` are the sequences, as int64, in a column."""
    kept = saved + rows * sequence * (4 * token_width) + columns
    tl.store(kept, weight, mask=mask)
    tl.store(kept + token_width, suppressed, mask=mask)
    tl.store(kept + 2 * token_width, candidate, mask=mask)
    tl.store(kept + 3 * token_width, output, mask=mask)
    states = rows * (sequence + 1) * token_width + columns
    tl.store(means + states, mean, mask=mask)
    tl.store(hiddens + states, hidden.to(hiddens.dtype.element_ty), mask=mask)


@triton.jit
def slstm_forward_resident_kernel(
    gates, weights, bias, starts, hiddens, means, saved, logarithm, stabilizer, source,
    gates_stride_batch, gates_stride_token, gates_stride_gate, gates_stride_head,
    batch, sequence, heads,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, EMPTY: tl.constexpr,
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
    bias += head * SIZE + columns
    input_bias = tl.load(bias, mask=columns < SIZE, other=0.0)
    forget_bias = tl.load(bias + token_width, mask=columns < SIZE, other=0.0)
    candidate_bias = tl.load(bias + 2 * token_width, mask=columns < SIZE, other=0.0)
    output_bias = tl.load(bias + 3 * token_width, mask=columns < SIZE, other=0.0)

    channels = head * SIZE + columns
    states = rows * (sequence + 1) * token_width + channels
    carried = rows * token_width + channels
    hidden = tl.load(hiddens + states, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(means + states, mask=mask, other=0.0)
    level = tl.load(logarithm + carried, mask=mask, other=0.0)
    highest = tl.load(stabilizer + carried, mask=mask, other=0.0)
    setter = tl.load(source + carried, mask=mask, other=-1)
    gates += rows * gates_stride_batch + head.to(tl.int64) * gates_stride_head + columns
    starts += sequences.to(tl.int64) * sequence
    for token in range(sequence):
        if HAS_DOCUMENTS:
            begins = tl.load(starts, mask=valid, other=0)[:, None] != 0
            hidden = tl.where(begins, 0.0, hidden)
            level = tl.where(begins, EMPTY, level)
            highest = tl.where(begins, EMPTY, highest)
            starts += 1
        operand = hidden.to(DOT_DTYPE)
        input_gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32) + input_bias
        forget_gate = tl.load(gates + gates_stride_gate, mask=mask, other=0.0).to(tl.float32) + forget_bias
        candidate = tl.load(gates + 2 * gates_stride_gate, mask=mask, other=0.0).to(tl.float32) + candidate_bias
        output_gate = tl.load(gates + 3 * gates_stride_gate, mask=mask, other=0.0).to(tl.float32) + output_bias
        input_gate += tl.dot(operand, input_weights, input_precision=PRECISION)
        forget_gate += tl.dot(operand, forget_weights, input_precision=PRECISION)
        candidate += tl.dot(operand, candidate_weights, input_precision=PRECISION)
        output_gate += tl.dot(operand, output_weights, input_precision=PRECISION)
        weight, suppressed, candidate, output, hidden, mean, level, highest, setter = slstm_cell(
            input_gate, forget_gate, candidate, output_gate, mean, level, highest, setter, token
        )
        hiddens += token_width
        means += token_width
        store_step(
            saved, hiddens, means, rows, channels, mask, token_width, sequence,
            weight, suppressed, candidate, output, hidden, mean,
        )  # fmt: skip
        saved += 4 * token_width
        gates += gates_stride_token
    tl.store(logarithm + carried, level, mask=mask)
    tl.store(stabilizer + carried, highest, mask=mask)
    tl.store(source + carried, setter, mask=mask)


@triton.jit
def slstm_forward_tiled_kernel(
    gates, weights, bias, starts, hiddens, means, saved, logarithm, stabilizer, source,
    gates_stride_batch, gates_stride_token, gates_stride_gate, gates_stride_head,
    batch, sequence, heads,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_INNER: tl.constexpr, ROWS: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, EMPTY: tl.constexpr,
):  # fmt: skip
    """Heads of any size, BLOCK channels at a time. Grid: (blocks of ROWS sequences, heads)."""
    sequences = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    rows = sequences.to(tl.int64)[:, None]
    valid = sequences < batch
    token_width = heads * SIZE
    matrix_size: tl.constexpr = SIZE * SIZE
    weights += head.to(tl.int64) * (4 * matrix_size)
    gates += rows * gates_stride_batch + head.to(tl.int64) * gates_stride_head
    bias += head * SIZE
    starts += sequences.to(tl.int64) * sequence
    states = rows * (sequence + 1) * token_width + head * SIZE
    carried = rows * token_width + head * SIZE
    begins = tl.zeros((ROWS, 1), dtype=tl.int1)
    for token in range(sequence):
        if HAS_DOCUMENTS:
            begins = tl.load(starts, mask=valid, other=0)[:, None] != 0
            starts += 1
        for first in range(0, SIZE, BLOCK):
            columns = first + tl.arange(0, BLOCK)[None, :]
            inside = columns < SIZE
            mask = valid[:, None] & inside
            input_gate = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            forget_gate = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            candidate = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            output_gate = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, SIZE, BLOCK_INNER):
                inner = start + tl.arange(0, BLOCK_INNER)
                read = valid[:, None] & (inner < SIZE)[None, :]
                if HAS_DOCUMENTS:
                    read = read & ~begins
                operand = tl.load(hiddens + states + inner[None, :], mask=read, other=0.0).to(DOT_DTYPE)
                tile = weights + inner[:, None] * SIZE + columns
                matrix = (inner < SIZE)[:, None] & inside
                part = tl.load(tile, mask=matrix, other=0.0).to(DOT_DTYPE)
                input_gate += tl.dot(operand, part, input_precision=PRECISION)
                part = tl.load(tile + matrix_size, mask=matrix, other=0.0).to(DOT_DTYPE)
                forget_gate += tl.dot(operand, part, input_precision=PRECISION)
                part = tl.load(tile + 2 * matrix_size, mask=matrix, other=0.0).to(DOT_DTYPE)
                candidate += tl.dot(operand, part, input_precision=PRECISION)
                part = tl.load(tile + 3 * matrix_size, mask=matrix, other=0.0).to(DOT_DTYPE)
                output_gate += tl.dot(operand, part, input_precision=PRECISION)
            own = gates + columns
            input_gate += tl.load(own, mask=mask, other=0.0).to(tl.float32)
            input_gate += tl.load(bias + columns, mask=inside, other=0.0)
            forget_gate += tl.load(own + gates_stride_gate, mask=mask, other=0.0).to(tl.float32)
            forget_gate += tl.load(bias + token_width + columns, mask=inside, other=0.0)
            candidate += tl.load(own + 2 * gates_stride_gate, mask=mask, other=0.0).to(tl.float32)
            candidate += tl.load(bias + 2 * token_width + columns, mask=inside, other=0.0)
            output_gate += tl.load(own + 3 * gates_stride_gate, mask=mask, other=0.0).to(tl.float32)
            output_gate += tl.load(bias + 3 * token_width + columns, mask=inside, other=0.0)
            mean = tl.load(means + states + columns, mask=mask, other=0.0)
            level = tl.load(logarithm + carried + columns, mask=mask, other=0.0)
            highest = tl.load(stabilizer + carried + columns, mask=mask, other=0.0)
            setter = tl.load(source + carried + columns, mask=mask, other=-1)
            if HAS_DOCUMENTS:
                level = tl.where(begins, EMPTY, level)
                highest = tl.where(begins, EMPTY, highest)
            weight, suppressed, candidate, output, hidden, mean, level, highest, setter = slstm_cell(
                input_gate, forget_gate, candidate, output_gate, mean, level, highest, setter, token
            )
            tl.store(logarithm + carried + columns, level, mask=mask)
            tl.store(stabilizer + carried + columns, highest, mask=mask)
            tl.store(source + carried + columns, setter, mask=mask)
            store_step(
                saved, hiddens + token_width, means + token_width, rows, head * SIZE + columns, mask, token_width,
                sequence, weight, suppressed, candidate, output, hidden, mean,
            )  # fmt: skip
        # The next step reads what other threads of this program have just written.
        tl.debug_barrier()
        hiddens += token_width
        means += token_width
        saved += 4 * token_width
        gates += gates_stride_token
