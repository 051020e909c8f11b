"""The mLSTM's state before a segment, where the segments of a sequence are on several ranks.

A segment turns a state into ``exp(decay) state + own``, where ``own`` is its state from a zero start. It is found
from keys, values and gates by one matrix product, and gradients by the chain rule: that of the forget gates has its
part that reaches over segments, ``<C, dC>`` at the segment's end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kernels.mlstm.state import MLSTMState, compute_dtype
from kernels.segments import Parts, PartsTold, Segments, weighted_outer_sum
from kernels.segments.gates import begins_later, decay_to_end


def start_exchange(
    segments: Segments,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    document_starts: Tensor | None,
) -> Callable[[], MLSTMState]:
    """Tells the other ranks what this segment does to a state.

    Args:
        segments: where this rank's segment stands; every rank makes this call.
        key, value, input_gate, forget_gate, document_starts: of this segment, as for ``mlstm``.

    Returns:
        To be called once, when other work is done: what :func:`kernels.mlstm.mlstm` takes as initial state, so that
        all ranks' segments are one sequence.
    """
    dtype = compute_dtype(key, value, input_gate, forget_gate)
    log_forget = logsigmoid(forget_gate.to(dtype))
    behind, decay = decay_to_end(log_forget, document_starts)
    exponent = behind + input_gate.to(dtype)
    # The largest exponent of all that is in the state, as the recurrence's running maximum has it.
    stabilizer = exponent.amax(1)
    if document_starts is not None:
        # A document begins from an empty state, whose stabilizer is 0 and decays like any.
        latest = document_starts & ~begins_later(document_starts)
        empty = (behind + log_forget).masked_fill(~latest[..., None], -torch.inf).amax(1)
        stabilizer = torch.maximum(stabilizer, empty)
    weights = torch.exp(exponent - stabilizer[:, None])
    matrix = weighted_outer_sum(weights, key, value)
    normalizer = weighted_outer_sum(weights, key, torch.ones_like(value[..., :1]))[..., 0]
    told = PartsTold((decay, stabilizer, matrix, normalizer), _combine, segments)

    def state() -> MLSTMState:
        _, stabilizer, matrix, normalizer = told.before()
        return MLSTMState(matrix, normalizer, stabilizer)

    return state


def _combine(earlier: Parts, later: Parts) -> Parts:
    """Two segments' ``(decay, stabilizer, matrix, normalizer)`` to that of both."""
    decayed = earlier[1] + later[0]
    stabilizer = torch.maximum(decayed, later[1])
    of_earlier, of_later = torch.exp(decayed - stabilizer), torch.exp(later[1] - stabilizer)
    matrix = of_earlier[..., None, None] * earlier[2] + of_later[..., None, None] * later[2]
    normalizer = of_earlier[..., None] * earlier[3] + of_later[..., None] * later[3]
    return earlier[0] + later[0], stabilizer, matrix, normalizer
