"""The convolution's state before a segment, where the segments of a sequence are on several ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.segments import Segments, Told
from kernels.segments.gates import begins_later


def start_exchange(
    segments: Segments, inputs: Tensor, width: int, document_starts: Tensor | None
) -> Callable[[], Tensor]:
    """Tells the next rank this segment's last inputs.

    Args:
        segments: where this rank's segment stands; every rank makes this call.
        inputs: (batch, sequence, channels), this segment.
        width: taps of the convolution.
        document_starts: (batch, sequence) bool, or None.

    Returns:
        To be called once, when other work is done: what :func:`kernels.conv1d.causal_conv1d` takes as initial state,
        the previous rank's last inputs.

    Raises:
        ValueError: the segment is shorter than ``width - 1``, so that one message is not enough.
    """
    reach, sequence = width - 1, inputs.shape[1]
    if sequence < reach:
        raise ValueError(
            f"conv1d: a segment of {sequence} tokens is shorter than the {reach} that a convolution of width {width} "
            f"looks back; use fewer segments or longer sequences."
        )
    window = inputs[:, sequence - reach :].to(torch.promote_types(inputs.dtype, torch.float32))
    if document_starts is not None:
        window = window.masked_fill(begins_later(document_starts[:, sequence - reach :])[..., None], 0.0)
    return Told(segments, window, "next").take
