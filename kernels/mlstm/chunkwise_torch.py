"""The mLSTM in chunkwise-parallel form on batched matrix products, with a hand-written exact backward.

Notation: inside a chunk, token t reads what token s <= t wrote with weight ``exp(row_t - column_s)``, where
``row_t = b_t - m_t``, ``column_s = b_s - i_s`` and b is the running sum of the log forget gates. The state at
the end of each chunk carries everything older. The running stabiliser m of all tokens is found first, by one
cumulative maximum over the sequence, so the weights never exceed one and no chunk needs its own maximum.

The backward treats the weights in unstabilised terms, where m cancels. What is left of m's gradient, through
``epsilon`` and through the stored final state, is sent to the token that set the maximum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from kernels.mlstm.chunkwise_gates import GateTerms, chunk_gates, gate_gradients, pair_weights, prepare_gates
from kernels.mlstm.state import MLSTMState, compute_dtype, zero_state


def _chunk(tensor: Tensor, factor: Tensor, multiply: bool = True) -> Tensor:
    """(batch, sequence, heads, size) -> (chunks * batch * heads, chunk_size, size), padded with zeros.

    ``factor`` (chunks, batch, heads, chunk_size) gives the shape and the dtype, and multiplies each token.
    """
    sequence, size = tensor.shape[1], tensor.shape[3]
    chunk_size = factor.shape[-1]
    full, rest = divmod(sequence, chunk_size)
    result = factor.new_empty(*factor.shape, size)
    pieces = []
    if full:
        source = tensor[:, : full * chunk_size].unflatten(1, (full, chunk_size)).permute(1, 0, 3, 2, 4)
        pieces.append((source, factor[:full], result[:full]))
    if rest:
        source = tensor[:, full * chunk_size :].permute(0, 2, 1, 3)
        pieces.append((source, factor[-1, :, :, :rest], result[-1, :, :, :rest]))
        result[-1, :, :, rest:].zero_()
    for source, source_factor, target in pieces:
        if multiply:
            torch.mul(source, source_factor[..., None], out=target)
        else:
            target.copy_(source)
    return result.flatten(0, 2)


def _unchunk(
    chunked: Tensor, factor: Tensor | None, chunked_shape: torch.Size, sequence: int, sequence_first: bool
) -> Tensor:
    """The inverse of ``_chunk`` for a ``chunked_shape`` of (chunks, batch, heads, chunk_size).

    The result is laid out in memory with the sequence before the batch if ``sequence_first``.
    """
    chunks, batch, heads, chunk_size = chunked_shape
    size = chunked.shape[-1]
    if sequence_first:
        padded = chunked.new_empty(chunks * chunk_size, batch, heads, size).transpose(0, 1)
    else:
        padded = chunked.new_empty(batch, chunks * chunk_size, heads, size)
    target = padded.unflatten(1, (chunks, chunk_size)).permute(1, 0, 3, 2, 4)
    source = chunked.view(*chunked_shape, size)
    if factor is None:
        target.copy_(source)
    else:
        torch.mul(source, factor[..., None], out=target)
    return padded[:, :sequence]


def _scan_states(
    decay: Tensor, written_keys: Tensor, values: Tensor, initial_matrix: Tensor, initial_normalizer: Tensor
) -> tuple[Tensor, Tensor]:
    """States at the chunk boundaries: (chunks + 1, batch * heads, query_key_size[, value_size])."""
    chunks, batch, heads = decay.shape
    matrices = initial_matrix.new_empty(chunks + 1, batch * heads, *initial_matrix.shape[2:])
    normalizers = initial_normalizer.new_empty(chunks + 1, batch * heads, initial_normalizer.shape[2])
    matrices[0], normalizers[0] = initial_matrix.flatten(0, 1), initial_normalizer.flatten(0, 1)
    torch.bmm(written_keys.mT, values, out=matrices[1:].flatten(0, 1))
    torch.sum(written_keys, 1, out=normalizers[1:].flatten(0, 1))
    for states, decays in (
        (matrices, decay.view(chunks, -1, 1, 1)),
        (normalizers, decay.view(chunks, -1, 1)),
    ):
        previous, *following = states.unbind()
        for state, state_decay in zip(following, decays.unbind(), strict=True):
            previous = state.addcmul_(previous, state_decay)
    return matrices, normalizers


def _scan_state_gradients(
    decay: Tensor,
    reading_queries: Tensor,
    numerator_gradient: Tensor,
    read_gradient: Tensor,
    final_matrix_gradient: Tensor | None,
    final_normalizer_gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the states of ``_scan_states``, in the same shapes."""
    chunks, batch, heads = decay.shape
    query_key_size, value_size = reading_queries.shape[-1], numerator_gradient.shape[-1]
    matrices = decay.new_empty(chunks + 1, batch * heads, query_key_size, value_size)
    normalizers = decay.new_empty(chunks + 1, batch * heads, query_key_size)
    torch.bmm(reading_queries.mT, numerator_gradient, out=matrices[:-1].flatten(0, 1))
    torch.bmm(read_gradient[:, None], reading_queries, out=normalizers[:-1].flatten(0, 1)[:, None])
    for gradients, final, decays in (
        (matrices, final_matrix_gradient, decay.view(chunks, -1, 1, 1)),
        (normalizers, final_normalizer_gradient, decay.view(chunks, -1, 1)),
    ):
        *earlier, following = gradients.unbind()
        if final is None:
            following.zero_()
        else:
            following.copy_(final.flatten(0, 1))
        for gradient, state_decay in zip(reversed(earlier), reversed(decays.unbind()), strict=True):
            following = gradient.addcmul_(following, state_decay)
    return matrices, normalizers


class _MLSTMChunkwise(torch.autograd.Function):
    """Keeps the chunked inputs, the states between chunks, the output and per-token terms for the backward.

    The matrices of pairs of tokens are computed again there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        input_gate: Tensor,
        forget_gate: Tensor,
        initial_matrix: Tensor,
        initial_normalizer: Tensor,
        initial_stabilizer: Tensor,
        document_starts: Tensor | None,
        chunk_size: int,
        epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = initial_matrix.dtype
        sequence, query_key_size = query.shape[1], query.shape[3]
        gates = prepare_gates(
            input_gate,
            forget_gate,
            initial_stabilizer,
            document_starts,
            chunk_size,
            query_key_size**-0.5,
            dtype,
        )
        queries = _chunk(query, gates.query_scale)
        keys = _chunk(key, gates.key_scale)
        values = _chunk(value, gates.row, multiply=False)
        written_keys = keys * gates.key_carry.view(-1, chunk_size, 1)
        matrices, normalizers = _scan_states(gates.decay, written_keys, values, initial_matrix, initial_normalizer)
        reading_queries = queries * gates.query_carry.view(-1, chunk_size, 1)
        weights = torch.bmm(queries, keys.mT).mul_(pair_weights(gates))
        numerator = torch.bmm(reading_queries, matrices[:-1].flatten(0, 1)).baddbmm_(weights, values)
        normalizer_read = torch.bmm(reading_queries, normalizers[:-1].flatten(0, 1)[..., None])[..., 0]
        normalizer_read = normalizer_read.add_(weights.sum(-1)).view_as(gates.row)
        lower_bound = torch.exp(-gates.stabilizer)
        magnitude = normalizer_read.abs()
        normalizer_sign = normalizer_read.sign().mul_(magnitude > lower_bound)
        inverse = torch.maximum(magnitude, lower_bound).add_(epsilon).reciprocal_()
        sequence_first = [tensor.stride(1) >= tensor.stride(0) for tensor in (query, key, value)]
        hidden = _unchunk(numerator, inverse, gates.row.shape, sequence, sequence_first[2])

        ctx.set_materialize_grads(False)
        ctx.epsilon, ctx.sequence_first = epsilon, sequence_first
        ctx.input_dtypes = [tensor.dtype for tensor in (query, key, value, input_gate)]
        ctx.save_for_backward(
            queries,
            keys,
            values,
            forget_gate,
            matrices,
            normalizers,
            hidden,
            inverse,
            normalizer_sign,
            *gates,
        )
        final_matrix = matrices[-1].view(initial_matrix.shape).clone()
        final_normalizer = normalizers[-1].view(initial_normalizer.shape).clone()
        return hidden.to(value.dtype), final_matrix, final_normalizer, gates.final_stabilizer.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        output_gradient: Tensor | None,
        final_matrix_gradient: Tensor | None,
        final_normalizer_gradient: Tensor | None,
        final_stabilizer_gradient: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        final_gradients = (final_matrix_gradient, final_normalizer_gradient, final_stabilizer_gradient)
        # Read once: activation checkpointing recomputes them when they are read, and refuses a second time.
        saved = ctx.saved_tensors
        with torch.autocast(saved[0].device.type, enabled=False):
            return _backward(ctx, saved, output_gradient, *final_gradients)


def _backward(
    ctx: Any,
    saved: tuple[Tensor, ...],
    output_gradient: Tensor | None,
    final_matrix_gradient: Tensor | None,
    final_normalizer_gradient: Tensor | None,
    final_stabilizer_gradient: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of ``_MLSTMChunkwise.forward``, in their order."""
    queries, keys, values, forget_gate, matrices, normalizers, hidden, inverse, normalizer_sign, *rest = saved
    gates = GateTerms(*rest)
    chunk_size = gates.row.shape[-1]
    query_carry = gates.query_carry.view(-1, chunk_size, 1)
    key_carry = gates.key_carry.view(-1, chunk_size, 1)

    # hidden = numerator * inverse, inverse = 1 / (max(|normalizer_read|, exp(-m)) + epsilon).
    if output_gradient is None:
        output_gradient = torch.zeros_like(hidden)
    numerator_gradient = _chunk(output_gradient, inverse)
    output_terms = (output_gradient * hidden).sum(-1).transpose(1, 2)
    output_terms = pad(output_terms, (0, -output_terms.shape[-1] % chunk_size))
    denominator_gradient = inverse.neg().mul_(chunk_gates(output_terms, chunk_size))
    read_gradient = (denominator_gradient * normalizer_sign).view(-1, chunk_size)

    matrix_gradients, normalizer_gradients = _scan_state_gradients(
        gates.decay,
        queries * query_carry,
        numerator_gradient,
        read_gradient,
        final_matrix_gradient,
        final_normalizer_gradient,
    )
    incoming, outgoing_gradient = matrices[:-1].flatten(0, 1), matrix_gradients[1:].flatten(0, 1)
    weights_of_pairs = pair_weights(gates)
    weights = torch.bmm(queries, keys.mT).mul_(weights_of_pairs)
    value_gradient = torch.bmm(keys * key_carry, outgoing_gradient).baddbmm_(weights.mT, numerator_gradient)
    score_gradient = torch.bmm(numerator_gradient, values.mT, out=weights)
    score_gradient.add_(read_gradient[..., None]).mul_(weights_of_pairs)
    query_gradient = torch.bmm(numerator_gradient, incoming.mT)
    query_gradient.addcmul_(read_gradient[..., None], normalizers[:-1].flatten(0, 1)[:, None])
    query_gradient.mul_(query_carry).baddbmm_(score_gradient, keys)
    key_gradient = torch.bmm(values, outgoing_gradient.mT)
    key_gradient.add_(normalizer_gradients[1:].flatten(0, 1)[:, None])
    key_gradient.mul_(key_carry).baddbmm_(score_gradient.mT, queries)

    state_terms = (matrices * matrix_gradients).sum((-2, -1)) + (normalizers * normalizer_gradients).sum(-1)
    batch, sequence, heads = forget_gate.shape
    input_gate_gradient, forget_gate_gradient, initial_stabilizer_gradient = gate_gradients(
        gates,
        forget_gate,
        (queries * query_gradient).sum(-1).view_as(gates.row),
        (keys * key_gradient).sum(-1).view_as(gates.row),
        state_terms.view(-1, batch, heads),
        denominator_gradient * ctx.epsilon,
        final_stabilizer_gradient,
    )
    chunked = ((query_gradient, gates.query_scale), (key_gradient, gates.key_scale), (value_gradient, None))
    input_gradients = [
        _unchunk(gradient, factor, gates.row.shape, sequence, sequence_first)
        for (gradient, factor), sequence_first in zip(chunked, ctx.sequence_first, strict=True)
    ]
    input_gradients.append(input_gate_gradient)
    return (
        *(gradient.to(dtype) for gradient, dtype in zip(input_gradients, ctx.input_dtypes, strict=True)),
        forget_gate_gradient.to(forget_gate.dtype),
        matrix_gradients[0].view(batch, heads, *matrices.shape[2:]),
        normalizer_gradients[0].view(batch, heads, -1),
        initial_stabilizer_gradient.to(matrices.dtype),
        None,
        None,
        None,
    )


def mlstm_chunkwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    initial_state: MLSTMState | None = None,
    document_starts: Tensor | None = None,
    chunk_size: int = 64,
    epsilon: float = 1e-6,
) -> tuple[Tensor, MLSTMState]:
    """Chunkwise mLSTM (Beck et al. 2025, "Tiled Flash Linear Attention", arXiv:2503.14376, section 3).

    Same arguments and results as ``kernels.mlstm.mlstm``; the gradients are exact, those of the denominator,
    of the stabilizer and of the forget gates across chunks and calls included. Not twice differentiable.
    """
    dtype = compute_dtype(query, key, value, input_gate, forget_gate)
    state = zero_state(query, value) if initial_state is None else initial_state
    with torch.autocast(query.device.type, enabled=False):
        output, *final = _MLSTMChunkwise.apply(
            query,
            key,
            value,
            input_gate,
            forget_gate,
            *(tensor.to(dtype) for tensor in state),
            document_starts,
            min(chunk_size, query.shape[1]),
            epsilon,
        )
    return output, MLSTMState(*final)
