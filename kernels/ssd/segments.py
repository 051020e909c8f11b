"""The state of Mamba-2's recurrence before a segment, where the segments of a sequence are on several ranks.

A segment turns a state into ``exp(decay) state + own``, where ``own`` is its state from a zero start, found from
values, keys and step sizes by one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.segments import Parts, PartsTold, Segments, weighted_outer_sum
from kernels.segments.gates import decay_to_end


def start_exchange(
    segments: Segments,
    values: Tensor,
    step_size: Tensor,
    decay_rate: Tensor,
    keys: Tensor,
    document_starts: Tensor | None,
) -> Callable[[], Tensor]:
    """Tells the other ranks what this segment does to a state.

    Args:
        segments: where this rank's segment stands; every rank makes this call.
        values, step_size, decay_rate, keys, document_starts: of this segment, as for ``ssd``.

    Returns:
        To be called once, when other work is done: what :func:`kernels.ssd.ssd` takes as initial state, so that all
        ranks' segments are one sequence.
    """
    is_double = any(tensor.dtype == torch.float64 for tensor in (values, step_size, decay_rate, keys))
    dtype = torch.float64 if is_double else torch.float32
    step_size = step_size.to(dtype)
    behind, decay = decay_to_end(step_size * decay_rate.to(dtype), document_starts)
    matrix = weighted_outer_sum(torch.exp(behind) * step_size, values, keys)
    told = PartsTold((decay, matrix), _combine, segments)
    return lambda: told.before()[1]


def _combine(earlier: Parts, later: Parts) -> Parts:
    """Two segments' ``(decay, matrix)`` to that of both."""
    return earlier[0] + later[0], torch.exp(later[0])[..., None, None] * earlier[1] + later[1]
