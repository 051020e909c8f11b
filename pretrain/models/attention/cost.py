"""What attention costs, from its configuration alone. Imports no torch.

With ``c`` channels of all query heads together, every pair of tokens takes ``2c`` FLOPs for the score and ``2c`` for
the weighted sum of values. **Useful work** counts only the pairs of which one may see the other: causal, and within
the window. **Executed work** counts as torch's ``FlopCounterMode`` does for fused attention: all ``sequence_length``
keys for every query, and backward five such products for the forward's two, as scores are computed again. A fused
kernel skips most of what lies above the diagonal, so it does less than that. Documents shorter than the sequence take
less too; neither figure knows of them.
"""

from __future__ import annotations

from pretrain.models.attention.config import MOST_MASKED_PAIRS, AttentionConfig
from pretrain.models.mixer_cost import MixerCost
from pretrain.models.segment_messages import SegmentMessage

_FLOAT32 = 4


def visible_pairs(sequence_length: int, window: int | None) -> int:
    """Pairs (query, key) of one sequence of which the query sees the key."""
    window = sequence_length if window is None else min(window, sequence_length)
    return window * (window + 1) // 2 + (sequence_length - window) * window


def cost(
    config: AttentionConfig, hidden_size: int, sequence_length: int, bytes_per_element: int, num_layers: int
) -> MixerCost:
    """Costs of one attention layer.

    Where tensor-parallel ranks do not divide the key heads, each rank computes and keeps all keys and values; FLOPs
    and bytes, which are meant to split evenly over ranks, are then too low by that.

    Args:
        config: of the mixer.
        hidden_size: width of the residual stream.
        sequence_length: tokens per sequence; the state is that after so many.
        bytes_per_element: of activations.
        num_layers: of the whole model; changes nothing here.
    """
    head = config.size_of_head(hidden_size)
    queries, keys = config.num_heads * head, config.key_value_heads * head
    projected = queries + 2 * keys
    weights = hidden_size * (projected + queries)
    norms = 2 * head if config.query_key_norm else 0
    output_bias = hidden_size if config.has_output_bias else 0
    replicated = norms + output_bias
    parameters = weights + replicated + (projected if config.bias else 0)

    kept_tokens = sequence_length
    if config.sliding_window is not None:
        kept_tokens = min(sequence_length, config.sliding_window - 1)

    # Attention keeps queries, keys, values, which are slices of one tensor unless something comes between, its output
    # and a float32 per head; the output projection keeps that output with the sequence first.
    activations = bytes_per_element * (projected + 2 * queries) + _FLOAT32 * config.num_heads
    rotary = config.rotary_size(hidden_size)
    if config.bias:
        activations += bytes_per_element * projected
    if config.query_key_norm:
        # In float32: what is normed (where that is not kept anyway) and the scale of each head.
        activations += _FLOAT32 * (queries + keys + config.num_heads + config.key_value_heads)
    if config.query_key_norm or rotary:
        activations += bytes_per_element * (queries + keys)
    # Sines and cosines.
    activations += _FLOAT32 * rotary
    # A row of the mask that keeps documents apart, of all heads.
    mask = bytes_per_element * sequence_length if sequence_length**2 <= MOST_MASKED_PAIRS else 0
    return MixerCost(
        parameters=parameters,
        parameters_replicated=replicated,
        parameters_partial=norms,
        parameters_grouped=2 * keys * (hidden_size + config.bias),
        parameter_groups=config.key_value_heads,
        active_parameters=parameters,
        projection_flops_per_token=2.0 * weights,
        scan_flops_per_token=4.0 * queries * visible_pairs(sequence_length, config.sliding_window) / sequence_length,
        executed_scan_flops_per_token=4.0 * queries * sequence_length,
        executed_scan_backward_flops_per_token=10.0 * queries * sequence_length,
        state_bytes=_FLOAT32 * (2 * keys * kept_tokens + 1),
        activation_bytes_per_token=float(activations + mask),
        activation_bytes_replicated=float(mask),
        # Gradients of queries, keys and values; that of the output takes the place of what the output projection kept.
        working_bytes_per_token=float(bytes_per_element * projected),
        parameters_at_once=hidden_size * projected,
    )


def kept_beside_messages(
    config: AttentionConfig, hidden_size: int, segment_length: int, ranks: int, bytes_per_element: int
) -> float:
    """What the last of several ranks keeps of a sequence beside messages: a mask over its own keys and earlier ones."""
    keys = segment_length * ranks
    if keys**2 <= MOST_MASKED_PAIRS:
        # Of so short a sequence the costs of a layer count one.
        return 0.0
    if config.sliding_window is not None:
        keys = min(keys, segment_length + config.sliding_window - 1)
    return float(bytes_per_element * segment_length * keys)


def segment_messages(
    config: AttentionConfig, hidden_size: int, segment_length: int, bytes_per_element: int
) -> list[SegmentMessage]:
    """What ranks that hold segments of a sequence say of it: keys and values, and how long its open document is.

    A window that the segment before holds whole comes from there alone. Gradients of keys that many ranks see are
    summed in float32.
    """
    both = 2 * config.key_value_heads * config.size_of_head(hidden_size)
    messages = [SegmentMessage("everyone", 2 * _FLOAT32, 0)]
    reach = segment_length + 1 if config.sliding_window is None else config.sliding_window - 1
    if 0 < reach <= segment_length:
        size = bytes_per_element * both * reach
        messages.append(SegmentMessage("next", size, size))
    elif reach:
        size = both * segment_length
        messages.append(SegmentMessage("everyone", bytes_per_element * size, _FLOAT32 * size))
    return messages
