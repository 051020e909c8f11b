"""What the mLSTM costs, from its configuration alone. Imports no torch.

With ``d`` query-key channels and ``v`` value channels per head, the chunkwise cell at chunk size ``L`` does, per
token and head and in the forward pass, ``4dv`` FLOPs to write and read the matrix memory, ``2d`` to read the
normaliser, and ``2(d + v)`` for every pair of tokens of a chunk (score, and weighted sum of values).

Of the ``L`` pairs per token the kernel multiplies, ``(L + 1) / 2`` lie on or below the diagonal. **Useful work**,
from which model FLOPs and utilisation are reckoned, counts only those, and counts the backward pass as twice the
forward, what the kernel computes again left out. **Executed work** counts whole squares, padding and what the
backward pass computes again. It is that of the torch kernel; the Triton kernel skips tiles above the diagonal
and computes the states at chunk boundaries again, which is within a few percent of the same.

The recurrent form needs the least: ``4dv + 4d``, whatever the length (:func:`recurrent_flops_per_token`). The
rest is what the chunkwise form pays for running on matrix products, so useful work grows with the chunk size.
"""

from __future__ import annotations

from pretrain.models.mixer_cost import MixerCost
from pretrain.models.mlstm.config import MLSTMConfig
from pretrain.models.segment_messages import SegmentMessage

_FLOAT32 = 4


def recurrent_flops_per_token(config: MLSTMConfig, hidden_size: int) -> float:
    """FLOPs forward per token of the step-by-step cell, all heads: the least that any form needs.

    Writes and reads of the matrix memory (``2dv`` each) and of the normaliser (``2d`` each); decays and gates,
    which are elementwise, are not counted.
    """
    query_key, value = config.query_key_size(hidden_size), config.value_size(hidden_size)
    return 4.0 * query_key * (value // config.num_heads) + 4.0 * query_key


def cost(
    config: MLSTMConfig, hidden_size: int, sequence_length: int, bytes_per_element: int, num_layers: int
) -> MixerCost:
    """Costs of one mLSTM layer.

    Args:
        config: of the mixer.
        hidden_size: width of the residual stream.
        sequence_length: tokens per sequence.
        bytes_per_element: of activations.
        num_layers: of the whole model; changes nothing here.
    """
    heads = config.num_heads
    query_key, value = config.query_key_size(hidden_size), config.value_size(hidden_size)
    value_head = value // heads
    projected = 2 * query_key + 2 * value + 2 * heads
    weights = hidden_size * projected + value * hidden_size
    parameters = weights + 2 * heads + value

    chunk = min(config.chunk_size, sequence_length)
    chunks = -(-sequence_length // chunk)
    rest = sequence_length - (chunks - 1) * chunk
    causal_pairs = ((chunks - 1) * chunk * (chunk + 1) + rest * (rest + 1)) / 2 / sequence_length
    padded = chunks * chunk / sequence_length
    memory = 2.0 * query_key * value_head
    normalizer = 2.0 * query_key
    executed_forward = 2 * memory + normalizer + 2.0 * chunk * (query_key + value)
    executed_backward = 4 * memory + normalizer + 2.0 * chunk * (3 * query_key + 2 * value)

    state = query_key * value_head + query_key + heads
    cast_copy = 0 if bytes_per_element == _FLOAT32 else _FLOAT32
    activations = (
        # All projections are one tensor; the output projection reads the gated result.
        bytes_per_element * (projected + value)
        # The cell's output, and its float32 copy for the norm where it is not float32 itself.
        + (bytes_per_element + cast_copy) * value
        # Normalised, normalised and scaled, and sigmoid of the output gate, all float32.
        + 3 * _FLOAT32 * value
        # Per head: tanh and pre-activation of both gates, and the cell's and the norm's scalars.
        + 10 * _FLOAT32 * heads
    )
    # What only comes after the cell, which its gradients have freed when they reach it.
    freed = (bytes_per_element + cast_copy + 3 * _FLOAT32) * value
    return MixerCost(
        parameters=parameters,
        parameters_replicated=0,
        active_parameters=parameters,
        parameters_at_once=hidden_size * projected,
        projection_flops_per_token=2.0 * weights,
        scan_flops_per_token=2 * memory + normalizer + 2.0 * causal_pairs * (query_key + value),
        executed_scan_flops_per_token=padded * executed_forward,
        executed_scan_backward_flops_per_token=padded * executed_backward,
        state_bytes=_FLOAT32 * state,
        activation_bytes_per_token=float(activations),
        working_bytes_per_token=max(
            gating_bytes(value, bytes_per_element),
            # Gradients of queries, keys, values, of the output gate and of the cell's output.
            cell_bytes(config, state, sequence_length) + bytes_per_element * (2 * query_key + 3 * value) - freed,
        ),
    )


def gating_bytes(channels: int, bytes_per_element: int) -> float:
    """Held per token while the output gate's gradient is made, of that gate, of what it scales, and of the product."""
    return channels * (2.0 * _FLOAT32 + (0 if bytes_per_element == _FLOAT32 else bytes_per_element))


def cell_bytes(config: MLSTMConfig, state: int, sequence_length: int) -> float:
    """Held per token by the cell's backward pass on a GPU, its results left out.

    States at all chunk boundaries, which it computes again, and their gradients; per head the gates' quantities, some
    in float64.

    Args:
        state: numbers in the state of all heads.
    """
    chunks = -(-sequence_length // min(config.chunk_size, sequence_length))
    return 2.0 * _FLOAT32 * state * (chunks + 1) / sequence_length + 14.0 * _FLOAT32 * config.num_heads


def segment_messages(
    config: MLSTMConfig, hidden_size: int, segment_length: int, bytes_per_element: int
) -> list[SegmentMessage]:
    """What ranks that hold segments of a sequence say of it: the state from a zero start, and each head's decay."""
    heads, query_key = config.num_heads, config.query_key_size(hidden_size)
    summary = query_key * (config.value_size(hidden_size) // heads) + query_key + 2 * heads
    return [SegmentMessage("before", _FLOAT32 * summary, _FLOAT32 * summary)]
