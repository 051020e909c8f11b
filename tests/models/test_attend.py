"""Attention by blocks, as GPUs have it, against a mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from pretrain.models.attention.attend import BLOCK, _by_blocks, _by_mask, block_mask, visible


def earliest_of(length: int, window: int | None, documents: float, batch: int = 2) -> torch.Tensor:
    """``(batch, length)``: the first key of each token's document, or of its window."""
    generator = torch.Generator().manual_seed(length)
    place = torch.arange(length)
    starts = torch.rand(batch, length, generator=generator) < documents
    first = torch.where(starts, place, 0).cummax(1).values
    return first if window is None else torch.maximum(first, place - window + 1)


CASES = [(64, None, 0.05), (129, None, 0.0), (300, None, 0.01), (300, 7, 0.02), (513, 200, 0.0), (640, 130, 0.004)]


@pytest.mark.parametrize(("length", "window", "documents"), CASES)
def test_blocks_give_what_a_mask_gives(length: int, window: int | None, documents: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, length, 16, generator=generator)
    key, value = (torch.randn(2, 2, length, 16, generator=generator) for _ in range(2))
    earliest = earliest_of(length, window, documents)
    expected = _by_mask(query, key, value, earliest, 0.25)
    # Uncompiled: the same mathematics, on the CPU.
    found = _by_blocks(query, key, value, earliest, 0.25, flex_attention)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "window", "documents"), CASES)
def test_the_blocks_that_are_read_are_those_that_some_query_sees(length, window, documents) -> None:
    earliest = earliest_of(length, window, documents)
    blocks = -(-length // BLOCK)
    padded = torch.zeros(2, blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    padded[:, :length, :length] = visible(earliest, length)
    needed = padded.unflatten(1, (blocks, BLOCK)).unflatten(3, (blocks, BLOCK)).any(4).any(2)
    assert torch.equal(block_mask(earliest).to_dense()[:, 0].bool(), needed)
