"""What the Triton kernels of the state-space recurrence share beyond tiles: decays between tokens."""

import triton
import triton.language as tl

from kernels.tiles import document_before


@triton.jit
def load_state_transposed(
    base, states, channels, HEAD_SIZE: tl.constexpr, STATE_SIZE: tl.constexpr, EVEN: tl.constexpr
):
    """The transpose of what `load_state` gives."""
    pointers = base + channels[None, :] * STATE_SIZE + states[:, None]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(channels < HEAD_SIZE)[None, :] & (states < STATE_SIZE)[:, None], other=0.0)


@triton.jit
def load_tokens(base, tokens, sequence):
    """One fp32 per token; zero behind the sequence."""
    return tl.load(base + tokens, mask=tokens < sequence, other=0.0)


@triton.jit
def reach_of(decay, documents, tokens, chunk, sequence, CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr):
    """How much of the state before the chunk is left at each token."""
    valid = tokens < sequence
    reach = tl.exp(tl.minimum(tl.load(decay + tokens, mask=valid, other=0.0), 0.0))
    if HAS_DOCUMENTS:
        document = tl.load(documents + tokens, mask=valid, other=-1)
        reach = tl.where(document == document_before(documents, chunk, CHUNK), reach, 0.0)
    return reach


@triton.jit
def survival_of(decay, documents, tokens, chunk, sequence, CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr):
    """How much of each token's contribution is left at the chunk's end."""
    valid = tokens < sequence
    last = tl.minimum((chunk + 1) * CHUNK, sequence) - 1
    total = tl.load(decay + last)
    survival = tl.exp(tl.minimum(total - tl.load(decay + tokens, mask=valid, other=0.0), 0.0))
    if HAS_DOCUMENTS:
        document = tl.load(documents + tokens, mask=valid, other=-1)
        survival = tl.where(document == tl.load(documents + last), survival, 0.0)
    return survival


@triton.jit
def keep_of(decay, documents, chunk, sequence, CHUNK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr):
    """How much of the state before the chunk is left at its end."""
    last = tl.minimum((chunk + 1) * CHUNK, sequence) - 1
    keep = tl.exp(tl.minimum(tl.load(decay + last), 0.0))
    if HAS_DOCUMENTS:
        keep = tl.where(tl.load(documents + last) == document_before(documents, chunk, CHUNK), keep, 0.0)
    return keep


@triton.jit
def related_tokens(documents, readers, sources, sequence, HAS_DOCUMENTS: tl.constexpr):
    """(readers, sources) bool: the reader sees the source. Neither vector need be the rows: see `related_sources`."""
    related = (sources[None, :] <= readers[:, None]) & (readers < sequence)[:, None]
    if HAS_DOCUMENTS:
        of_readers = tl.load(documents + readers, mask=readers < sequence, other=-1)
        of_sources = tl.load(documents + sources, mask=sources < sequence, other=-2)
        related = related & (of_readers[:, None] == of_sources[None, :])
    return related


@triton.jit
def related_sources(documents, sources, readers, sequence, HAS_DOCUMENTS: tl.constexpr):
    """(sources, readers) bool: the transpose of `related_tokens`."""
    related = (sources[:, None] <= readers[None, :]) & (readers < sequence)[None, :]
    if HAS_DOCUMENTS:
        of_readers = tl.load(documents + readers, mask=readers < sequence, other=-1)
        of_sources = tl.load(documents + sources, mask=sources < sequence, other=-2)
        related = related & (of_sources[:, None] == of_readers[None, :])
    return related
