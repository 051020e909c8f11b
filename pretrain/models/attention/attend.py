"""Softmax attention of each query over a range of keys, by the kernels that torch has.

A query sees the keys from its *earliest* to itself, and the earliest never goes back as queries go on. Documents,
windows and keys of earlier calls are all of that form.

Where every query sees all keys up to its own, fused causal attention needs no mask. Otherwise:

* ``_by_mask``: a boolean mask of ``batch * queries * keys`` bytes, which torch turns into additive terms of the
  queries' dtype. On any device. At 8192 tokens in bfloat16 that is 64 MiB and 128 MiB per sequence, and each layer
  keeps the latter for its backward pass.
* ``_by_blocks``: FlexAttention on a GPU, which leaves out the 128 x 128 blocks that no query sees. Its block mask
  holds four int32 per pair of blocks, 64 KiB per sequence at 8192 tokens. It is compiled when first used, which takes
  tens of seconds, so shorter sequences and decoding keep to the mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from pretrain.models.attention.config import MOST_MASKED_PAIRS

BLOCK = 128


def attend(query: Tensor, key: Tensor, value: Tensor, earliest: Tensor | None, scale: float) -> Tensor:
    """Causal attention; the last query sits at the last key.

    Args:
        query: ``(batch, queries, heads, size)``.
        key, value: ``(batch, keys, key_heads, size)``; consecutive heads of the queries share one.
        earliest: ``(batch, queries)`` int64, the place of the first key that each query sees, which must not
            decrease; None: every query sees from the first key on, and there are as many keys as queries.
        scale: factor of the scores.

    Returns:
        ``(batch, queries, heads, size)`` in the dtype of ``query``.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if earliest is None:
        key, value = _for_kernel(query, key, value, masked=False)
        grouped = key.shape[1] < query.shape[1]
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    elif query.is_cuda and query.shape[2] == key.shape[2] and query.shape[2] ** 2 > MOST_MASKED_PAIRS:
        output = _by_blocks(query, key, value, earliest, scale, _compiled_flex_attention())
    else:
        output = _by_mask(query, key, value, earliest, scale)
    return output.transpose(1, 2)


def _for_kernel(query: Tensor, key: Tensor, value: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    """Keys and values, repeated for each query head where the GPU's fused kernel cannot share them."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or not query.is_cuda or (query.dtype.itemsize == 2 and not masked):
        return key, value
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def visible(earliest: Tensor, keys: int) -> Tensor:
    """``(batch, queries, keys)`` bool: which keys each query sees; the last query sits at the last key."""
    queries = earliest.shape[1]
    place = torch.arange(keys, device=earliest.device)
    own = place[keys - queries :, None]
    return (place <= own) & (place >= earliest[..., None])


def _by_mask(query: Tensor, key: Tensor, value: Tensor, earliest: Tensor, scale: float) -> Tensor:
    mask = visible(earliest, key.shape[2])[:, None]
    key, value = _for_kernel(query, key, value, masked=True)
    grouped = key.shape[1] < query.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def block_mask(earliest: Tensor) -> BlockMask:
    """Which blocks of keys each block of queries sees in part or in full, for as many keys as queries.

    Made from the first and last query of each block, so that no mask over all pairs exists at any time and a GPU need
    not be waited for.
    """
    length, device = earliest.shape[1], earliest.device
    blocks = -(-length // BLOCK)
    first = torch.arange(blocks, device=device) * BLOCK
    # Both (batch, 1, blocks of queries, 1).
    least = earliest[:, None, first, None]
    most = earliest[:, None, (first + BLOCK - 1).clamp(max=length - 1), None]
    full = (first < first[:, None]) & (first >= most)
    partial = (first <= first[:, None]) & (first + BLOCK > least) & ~full

    def sees(row: Tensor, head: Tensor, own: Tensor, place: Tensor) -> Tensor:
        return (place <= own) & (place >= earliest[row, own])

    counts_and_places: list[Tensor] = []
    for chosen in (partial, full):
        places = torch.argsort((~chosen).int(), dim=-1, stable=True)
        counts_and_places += [chosen.sum(-1, dtype=torch.int32), places.int()]
    return BlockMask.from_kv_blocks(*counts_and_places, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length))


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, earliest: Tensor, scale: float, kernel: Callable[..., Tensor]
) -> Tensor:
    mask = block_mask(earliest.expand(query.shape[0], -1).contiguous())
    return kernel(query, key, value, block_mask=mask, scale=scale, enable_gqa=key.shape[1] < query.shape[1])


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    # Compiled once for the shapes of training; other shapes are compiled when they come.
    return torch.compile(flex_attention)
