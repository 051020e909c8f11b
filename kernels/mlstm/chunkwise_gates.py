"""What the gates of a chunkwise mLSTM determine on their own, and the gates' gradients.

These are arrays of one number per token and head, so they are kept in float64 where sums over many tokens
would cost precision. ``chunkwise_torch`` explains the notation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

# The input gate of the padding behind the last token: writes nothing. A power of two, so that adding an
# ordinary gate to it is exact or vanishes.
_NO_INPUT = -(2.0**100)


class GateTerms(NamedTuple):
    """What the gates alone determine. Chunked tensors are (chunks, batch, heads, chunk_size)."""

    row: Tensor  # exponent of the reading token, chunked
    column: Tensor  # exponent of the writing token, chunked; weight = exp(row - column)
    query_scale: Tensor  # chunked; multiplies queries: query_key_size**-0.5 and row's rounding error
    key_scale: Tensor  # chunked; multiplies keys: column's rounding error
    query_carry: Tensor  # chunked; multiplies the scaled query where it reads the incoming state
    key_carry: Tensor  # chunked; multiplies the scaled key where it is written to the outgoing state
    decay: Tensor  # (chunks, batch, heads): what is left of the incoming state in the outgoing one
    stabilizer: Tensor  # m, chunked
    final_stabilizer: Tensor  # (batch, heads)
    source: Tensor  # (batch, heads, padded): 1 + the token that set m, or 0 where the initial state did
    floor: Tensor | None  # (batch, heads, padded): document starts whose m is the empty state's decayed 0
    segment: Tensor | None  # (chunks, batch, 1, chunk_size): documents begun in the chunk so far
    hidden_pairs: Tensor | None  # (chunks, batch, 1, chunk_size, chunk_size): pairs of different documents


def chunk_gates(gates: Tensor, chunk_size: int) -> Tensor:
    """(batch, heads, padded) -> (chunks, batch, heads, chunk_size), a view."""
    return gates.unflatten(-1, (-1, chunk_size)).permute(2, 0, 1, 3)


def _unchunk_gates(chunked: Tensor) -> Tensor:
    """(chunks, batch, heads, chunk_size) -> (batch, heads, padded)."""
    return chunked.permute(1, 2, 0, 3).flatten(2)


def prepare_gates(
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_stabilizer: Tensor,
    document_starts: Tensor | None,
    chunk_size: int,
    query_scale: float,
    dtype: torch.dtype,
) -> GateTerms:
    """Running sums, stabiliser and weights of all tokens.

    Args:
        input_gate, forget_gate: (batch, sequence, heads) pre-activations.
        initial_stabilizer: (batch, heads).
        document_starts: (batch, sequence) bool or None.
        chunk_size: tokens per chunk; the last chunk is padded with tokens that neither write nor forget.
        query_scale: constant factor of all queries.
        dtype: of the results.
    """
    padding = -input_gate.shape[1] % chunk_size
    inputs = input_gate.to(dtype).transpose(1, 2).double().clamp_min(_NO_INPUT)
    log_forget = logsigmoid(forget_gate.to(dtype)).transpose(1, 2).double()
    start_stabilizer = initial_stabilizer.double()[..., None]
    floor = segment = hidden_pairs = None
    candidates = inputs
    if document_starts is not None:
        starts = document_starts[:, None]
        at_start = torch.maximum(inputs, log_forget)
        candidates = torch.where(starts, at_start, inputs)
        floor = pad(starts & (log_forget > inputs), (0, padding))
        # At a document's start the running sum falls by just enough that no older candidate can be the
        # maximum. Weights across documents are masked besides: the fall alone would be a soft reset.
        highest = torch.maximum(inputs.max(), start_stabilizer.max()).clamp_min(0.0)
        log_forget = torch.where(starts, at_start.min() - highest - 1.0, log_forget)
        chunk_starts = chunk_gates(pad(starts, (0, padding)), chunk_size)
        segment = chunk_starts.cumsum(-1)
        if bool(chunk_starts[..., 1:].any()):
            hidden_pairs = segment[..., :, None] != segment[..., None, :]
    inputs, candidates = (pad(tensor, (0, padding), value=_NO_INPUT) for tensor in (inputs, candidates))
    running = pad(log_forget, (0, padding)).cumsum(-1)
    highest_so_far, source = torch.cat((start_stabilizer, candidates - running), -1).cummax(-1)
    stabilizer = highest_so_far[..., 1:] + running

    running = chunk_gates(running - _before_chunk(running, chunk_size), chunk_size).contiguous()
    incoming = torch.cat((start_stabilizer, stabilizer[..., chunk_size - 1 : -1 : chunk_size]), -1)
    stabilizer = chunk_gates(stabilizer, chunk_size).contiguous()
    row = running - stabilizer
    column = running - chunk_gates(inputs, chunk_size)
    carry_weight = (row + incoming.permute(2, 0, 1)[..., None]).to(dtype).exp_()
    write_weight = (row[..., -1:] - column).to(dtype).exp_()
    if segment is not None:
        carry_weight.masked_fill_(segment > 0, 0.0)
        write_weight.masked_fill_(segment != segment[..., -1:], 0.0)
    rounded_row, rounded_column = row.to(dtype), column.to(dtype)
    # With strong forgetting row and column are large and nearly cancel; what rounding takes from them is
    # given back as a factor near one on queries and keys.
    row_factor = (row - rounded_row).to(dtype).exp_()
    column_factor = (rounded_column - column).to(dtype).exp_()
    return GateTerms(
        row=rounded_row,
        column=rounded_column,
        query_scale=row_factor * query_scale,
        key_scale=column_factor,
        query_carry=carry_weight / row_factor,
        key_carry=write_weight / column_factor,
        decay=carry_weight[..., -1],
        stabilizer=stabilizer.to(dtype),
        final_stabilizer=stabilizer[-1, ..., -1].to(dtype),
        source=source[..., 1:],
        floor=floor,
        segment=segment,
        hidden_pairs=hidden_pairs,
    )


def _before_chunk(running: Tensor, chunk_size: int) -> Tensor:
    """The running sum before each token's chunk, (batch, heads, padded)."""
    before = pad(running[..., chunk_size - 1 : -1 : chunk_size], (1, 0))
    return before.repeat_interleave(chunk_size, -1)


def pair_weights(gates: GateTerms) -> Tensor:
    """``exp(row_t - column_s)`` for s <= t of one document, else 0: (chunks * batch * heads, size, size)."""
    weights = (gates.row[..., :, None] - gates.column[..., None, :]).exp_()
    if gates.hidden_pairs is not None:
        weights.masked_fill_(gates.hidden_pairs, 0.0)
    return weights.flatten(0, 2).tril_()


def _reverse_cumsum(tensor: Tensor) -> Tensor:
    return tensor.flip(-1).cumsum(-1).flip(-1)


def _document_reverse_cumsum(terms: Tensor, at_end: Tensor, segment: Tensor | None) -> Tensor:
    """Sum from each token to the end of its chunk, ``at_end`` included, or to the end of its document there.

    At a document's first token the result is 0: its forget gate multiplies an empty state.
    """
    sums = _reverse_cumsum(terms) + at_end[..., None]
    if segment is None:
        return sums
    chunk_size = terms.shape[-1]
    positions = torch.arange(chunk_size, device=terms.device)
    first = pad(segment, (1, 0))[..., :-1] != segment
    starts = torch.where(first, positions, chunk_size)
    next_start = pad(starts, (0, 1), value=chunk_size)[..., 1:].flip(-1).cummin(-1).values.flip(-1)
    beyond = pad(sums, (0, 1)).gather(-1, next_start.expand(sums.shape))
    return (sums - beyond).masked_fill(first, 0.0)


def gate_gradients(
    gates: GateTerms,
    forget_gate: Tensor,
    query_terms: Tensor,
    key_terms: Tensor,
    state_terms: Tensor,
    stabilizer_gradient: Tensor,
    final_stabilizer_gradient: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input gate and forget gate (batch, sequence, heads) and initial stabilizer (batch, heads).

    In unstabilised terms a token's log input gate scales its key, so its gradient is <k, dk>. A log forget
    gate scales what any earlier token or state contributes to any later one, so its gradient is the sum of
    <q, dq> - <k, dk> over the rest of the chunk plus <C, dC> + <n, dn> at the chunk's end. The stabilizer's
    own gradient goes to the gates that set the maximum.

    Args:
        gates: of the forward.
        forget_gate: (batch, sequence, heads) pre-activations.
        query_terms, key_terms: <q, dq> and <k, dk> of each token, chunked.
        state_terms: <C, dC> + <n, dn> at every chunk boundary, (chunks + 1, batch, heads).
        stabilizer_gradient: chunked; the gradient of each m with the unstabilised states held fixed.
        final_stabilizer_gradient: (batch, heads); of the returned stabilizer, or None.
    """
    sequence = forget_gate.shape[1]
    query_terms, key_terms, state_terms = query_terms.double(), key_terms.double(), state_terms.double()
    log_forget = _document_reverse_cumsum(query_terms - key_terms, state_terms[1:], gates.segment)
    log_forget, inputs = _unchunk_gates(log_forget), _unchunk_gates(key_terms)

    through_maximum = _unchunk_gates(stabilizer_gradient.double())
    # The returned state is the unstabilised one times exp(-m).
    through_maximum[..., -1] -= state_terms[-1]
    if final_stabilizer_gradient is not None:
        through_maximum[..., -1] += final_stabilizer_gradient
    routed = pad(torch.zeros_like(through_maximum), (1, 0)).scatter_add_(-1, gates.source, through_maximum)
    initial_stabilizer = routed[..., 0] + state_terms[0]
    routed = routed[..., 1:]
    log_forget += _reverse_cumsum(through_maximum - routed)
    if gates.floor is None:
        inputs += routed
    else:
        inputs += routed.masked_fill(gates.floor, 0.0)
        log_forget += routed.masked_fill(~gates.floor, 0.0)
    inputs, log_forget = (tensor[..., :sequence].transpose(1, 2) for tensor in (inputs, log_forget))
    return inputs, log_forget * torch.sigmoid(-forget_gate.double()), initial_stabilizer
