"""From chunks back to positions: smoothed over chunks, then each position takes that of its chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.affine_scan import affine_scan
from pretrain.models.hierarchy.chunking import Chunks


def dechunk(vectors: Tensor, probability: Tensor, chunks: Chunks, carried: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smooths chunks by an exponential moving average, and hands the latest one to each position.

    Over the chunks of each document (Hwang et al. 2025, arXiv 2507.07955, equation 5)::

        s_j = P_j z_j + (1 - P_j) s_{j-1}

    where P_j is the probability of the boundary at which chunk j begins; it is 1 for a document's first, so that
    nothing comes in from before. No clamp of P_j is needed, as the scan takes its factors as they are.

    Args:
        vectors: z, ``(chunks, size)``, what the inner network made of each chunk.
        probability: ``(batch, sequence)`` float32, of a boundary at each position.
        chunks: where those chunks begin.
        carried: ``(batch, size)`` float32, the average before this call; None where sequences begin here.

    Returns:
        ``(sequence, batch, size)`` float32, and the average after the last position, ``(batch, size)``.
    """
    dtype = vectors.dtype if vectors.dtype == torch.float64 else torch.float32
    smoothed = _smooth(vectors.to(dtype), probability.to(dtype), chunks, carried)
    if carried is None:
        # Every position's chunk began within this call.
        return smoothed[chunks.latest.t()], smoothed[chunks.latest[:, -1]]
    # Behind the chunks what was carried in, for positions whose chunk began earlier.
    choices = torch.cat([smoothed, carried.to(dtype)])
    rows = torch.arange(len(carried), device=vectors.device)[:, None] + len(vectors)
    places = torch.where(chunks.latest < 0, rows, chunks.latest)
    return choices[places.t()], choices[places[:, -1]]


def _smooth(vectors: Tensor, probability: Tensor, chunks: Chunks, carried: Tensor | None) -> Tensor:
    """The moving average, ``(chunks, size)``."""
    if not len(vectors):
        # Single positions of which none begins a chunk.
        return vectors
    weight = probability[chunks.row, chunks.position][:, None]
    first = chunks.begins_sequence
    inputs = weight * vectors
    if carried is not None:
        # A sequence's first chunk takes in what was carried to it; one that begins a document has weight 1.
        inputs = inputs + (1.0 - weight) * carried.to(vectors.dtype)[chunks.row] * first[:, None]
    restarts = first | chunks.begins_document
    coefficients = (1.0 - weight).expand_as(inputs)
    return affine_scan(coefficients[None], inputs[None], document_starts=restarts[None])[0]
