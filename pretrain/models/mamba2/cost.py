"""What Mamba-2 costs, from its configuration alone. Imports no torch.

With heads of ``P`` channels and a state of ``N``, the chunkwise recurrence at chunk size ``L`` does, per token in the
forward pass, ``4PN`` FLOPs for each head to write and read the state and ``2P`` for every pair of tokens of a chunk;
the scores of those pairs, ``2N`` each, are shared by the heads of a group. Useful work counts only pairs of which one
may see the other, and the backward pass as twice the forward; executed work is that of the torch kernel.
"""

from __future__ import annotations

from pretrain.models.mamba2.config import Mamba2Config
from pretrain.models.mixer_cost import MixerCost
from pretrain.models.segment_messages import SegmentMessage, window_before
from pretrain.models.tensor_messages import TensorMessage, split_projections, summed_inside

_FLOAT32 = 4


def cost(
    config: Mamba2Config, hidden_size: int, sequence_length: int, bytes_per_element: int, num_layers: int
) -> MixerCost:
    """Costs of one Mamba-2 layer.

    Args:
        config: of the mixer.
        hidden_size: width of the residual stream.
        sequence_length: tokens per sequence.
        bytes_per_element: of activations.
        num_layers: of the whole model; changes nothing here.
    """
    heads, inner = config.heads(hidden_size), config.inner_size(hidden_size)
    groups, state_size = config.num_groups, config.state_size
    keys = groups * state_size
    convolved = inner + 2 * keys
    projected = inner + convolved + heads
    weights = hidden_size * projected + inner * hidden_size
    window = config.convolution_width
    parameters = weights + convolved * (window + config.convolution_bias) + 3 * heads + inner
    parameters += 0 if config.gate_bias is None else inner

    chunk = min(config.chunk_size, sequence_length)
    chunks = -(-sequence_length // chunk)
    rest = sequence_length - (chunks - 1) * chunk
    causal_pairs = ((chunks - 1) * chunk * (chunk + 1) + rest * (rest + 1)) / 2 / sequence_length
    padded = chunks * chunk / sequence_length
    memory = 2.0 * inner * state_size
    scores, mixing = 2.0 * keys, 2.0 * inner
    executed_forward = 2 * memory + chunk * (scores + mixing)
    executed_backward = 6 * memory + chunk * (3 * scores + 2 * mixing)

    state = inner * state_size + (window - 1) * convolved
    gate_copy = 0 if bytes_per_element == _FLOAT32 and config.gate_bias is None else _FLOAT32
    activations = (
        # All projections are one tensor, and the convolution's outputs another; the output projection reads a third.
        bytes_per_element * (projected + convolved + inner)
        # In float32: the recurrence's output, the gate where that is not float32 itself or has a bias, its silu, their
        # product, and the norm's result before its weight.
        + (4 * _FLOAT32 + gate_copy) * inner
        # Step sizes and their pre-activation.
        + 2 * _FLOAT32 * heads
    )
    # The backward pass computes the states at all chunk boundaries again, and their gradients, and the scores of a
    # chunk's pairs with theirs; per head it has sums of several kinds.
    cell = 2.0 * _FLOAT32 * inner * state_size * (chunks + 1) / sequence_length
    cell += 2.0 * bytes_per_element * groups * chunk + 7.0 * _FLOAT32 * heads
    # What only comes after the recurrence, which its gradients have freed when they reach it.
    freed = (bytes_per_element + 4 * _FLOAT32 + gate_copy) * inner
    return MixerCost(
        parameters=parameters,
        parameters_replicated=0,
        parameters_grouped=2 * keys * (hidden_size + window + config.convolution_bias),
        parameter_groups=groups,
        active_parameters=parameters,
        projection_flops_per_token=2.0 * weights,
        scan_flops_per_token=2 * memory + causal_pairs * (scores + mixing),
        executed_scan_flops_per_token=padded * executed_forward,
        executed_scan_backward_flops_per_token=padded * executed_backward,
        state_bytes=_FLOAT32 * state,
        activation_bytes_per_token=float(activations),
        parameters_at_once=hidden_size * projected,
        working_bytes_per_token=max(
            # While the norm's gradient is made: three float32 tensors beside what is kept, and the gradient that came.
            inner * (3.0 * _FLOAT32 + (0 if bytes_per_element == _FLOAT32 else bytes_per_element)),
            # Gradients of values, of the gate and of the recurrence's output, of keys and queries.
            cell + bytes_per_element * (3 * inner + 2 * keys) - freed,
        ),
        # A multiply-add for each tap, and the skip connection's.
        elementwise_scan_flops_per_token=2.0 * window * convolved + 2.0 * inner,
    )


def segment_messages(
    config: Mamba2Config, hidden_size: int, segment_length: int, bytes_per_element: int
) -> list[SegmentMessage]:
    """What ranks that hold segments of a sequence say of it: the convolution's last inputs; state and heads' decays."""
    inner = config.inner_size(hidden_size)
    summary = _FLOAT32 * (inner * config.state_size + config.heads(hidden_size))
    convolved = inner + 2 * config.num_groups * config.state_size
    return [window_before(convolved, config.convolution_width), SegmentMessage("before", summary, summary)]


def tensor_messages(
    config: Mamba2Config, hidden_size: int, bytes_per_element: int, tensor: int, sequence: bool
) -> list[TensorMessage]:
    """Those of the projections, and squares that groups of the norm have on several ranks."""
    inside = summed_inside(config.num_groups) if config.num_groups % tensor else []
    return inside + split_projections(config, hidden_size, bytes_per_element, tensor, sequence)
