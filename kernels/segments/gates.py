"""How much of what a token writes is left at the end of its segment."""

from __future__ import annotations

import torch
from torch import Tensor


def begins_later(document_starts: Tensor) -> Tensor:
    """Where ``document_starts`` (batch, sequence) says that a document begins behind the token."""
    from_here_on = document_starts.flip(1).cumsum(1).flip(1)
    return from_here_on > document_starts.long()


def decay_to_end(log_decay: Tensor, document_starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logarithms of what the tokens behind each token leave of it, and of what the segment leaves of an older state.

    Args:
        log_decay: (batch, sequence, heads), at most 0: of what each token leaves of the state before it.
        document_starts: (batch, sequence) bool, tokens before which the state becomes zero; None: there are none.

    Returns:
        (batch, sequence, heads) and (batch, heads), minus infinity where a document begins in between. Sums are
        made in float64, and returned in the dtype of ``log_decay``.
    """
    sums = log_decay.double().flip(1).cumsum(1).flip(1)
    whole = sums[:, 0]
    behind = sums - log_decay.double()
    if document_starts is not None:
        behind = behind.masked_fill(begins_later(document_starts)[..., None], -torch.inf)
        whole = whole.masked_fill(document_starts.any(1)[:, None], -torch.inf)
    return behind.to(log_decay.dtype), whole.to(log_decay.dtype)
