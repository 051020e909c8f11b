"""A model in its training layout that reads whole sequences on every rank, as decoding one token at a time needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pretrain.models.decoder import Decoder
from pretrain.models.linear import ColumnParallelProjections

# How Megatron-core's layers, and ours, say that tensor-parallel ranks hold parts of the sequence.
_FLAGS = ("sequence_parallel", "reduce_scatter_embeddings")


@contextlib.contextmanager
def whole_sequences(decoder: Decoder) -> Iterator[None]:
    """While entered, no rank holds a part of a sequence: neither by sequence parallelism nor as a segment.

    For forward passes without gradients. Heads, channels, layers, experts and ZeRO's shares stay where they are, so
    ranks that hold parts of them make the same calls; weights that segments have in common are whole on each rank.
    """
    segments, chain = decoder.segments, decoder.chain
    flags = [(module, name) for module in decoder.modules() for name in _FLAGS if getattr(module, name, False)]
    split = decoder.config.sequence_parallel
    # Each has read the configuration when it was made; those that are made meanwhile read another one.
    products = [
        (module, module.linears) for module in decoder.modules() if isinstance(module, ColumnParallelProjections)
    ]
    try:
        decoder.segments = decoder.chain = None
        decoder.config.sequence_parallel = False
        for module, name in flags:
            setattr(module, name, False)
        for module, _ in products if split else ():
            module.linears = {}
        yield
    finally:
        decoder.segments, decoder.chain = segments, chain
        decoder.config.sequence_parallel = split
        for module, name in flags:
            setattr(module, name, True)
        for module, linears in products:
            module.linears = linears
