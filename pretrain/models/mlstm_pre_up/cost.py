"""What the pre-up-projection mLSTM costs, from its configuration alone. Imports no torch.

The cell is that of ``pretrain.models.mlstm`` with queries, keys and values of the inner width, and its cost is taken
from there.
"""

from __future__ import annotations

from pretrain.models.mixer_cost import MixerCost
from pretrain.models.mlstm.config import MLSTMConfig
from pretrain.models.mlstm.cost import cell_bytes, gating_bytes
from pretrain.models.mlstm.cost import cost as mlstm_cost
from pretrain.models.mlstm.cost import segment_messages as cell_messages
from pretrain.models.mlstm_pre_up.config import MLSTMPreUpConfig
from pretrain.models.segment_messages import SegmentMessage, window_before
from pretrain.models.tensor_messages import TensorMessage, split_projections

_FLOAT32 = 4


def cost(
    config: MLSTMPreUpConfig, hidden_size: int, sequence_length: int, bytes_per_element: int, num_layers: int
) -> MixerCost:
    """Costs of one layer.

    Args:
        config: of the mixer.
        hidden_size: width of the residual stream.
        sequence_length: tokens per sequence.
        bytes_per_element: of activations.
        num_layers: of the whole model; changes nothing here.
    """
    heads, inner, width = config.num_heads, config.inner_size(hidden_size), config.convolution_width
    cell = mlstm_cost(_cell(config), inner, sequence_length, bytes_per_element, num_layers)

    # Up to the cell's input and the output's gate, and down; queries, keys and values; both gates of each head.
    weights = 3 * hidden_size * inner + 3 * inner * config.projection_block_size + 3 * inner * 2 * heads
    # Convolution with bias, gate biases, norm, skip.
    parameters = weights + inner * (width + 1) + 2 * heads + 2 * inner
    cast_copy = 0 if bytes_per_element == _FLOAT32 else _FLOAT32
    activations = (
        # Both halves of the up projection, the convolved one, queries, keys and values, and what is projected down.
        bytes_per_element * 7 * inner
        # The cell's output, and its float32 copy for the norm where it is not float32 itself.
        + (bytes_per_element + cast_copy) * inner
        # Normalised, with the skip, and the SiLU of the gate, all float32; the gate, where it is not float32 itself.
        + (3 * _FLOAT32 + cast_copy) * inner
        # Per head: both gates, and the cell's and the norm's scalars.
        + 8 * _FLOAT32 * heads
    )
    # What only comes after the cell, which its gradients have freed when they reach it.
    freed = (bytes_per_element + cast_copy + 3 * _FLOAT32 + cast_copy) * inner
    return MixerCost(
        parameters=parameters,
        parameters_replicated=0,
        active_parameters=parameters,
        parameters_at_once=2 * hidden_size * inner,
        projection_flops_per_token=2.0 * weights,
        scan_flops_per_token=cell.scan_flops_per_token,
        executed_scan_flops_per_token=cell.executed_scan_flops_per_token,
        executed_scan_backward_flops_per_token=cell.executed_scan_backward_flops_per_token,
        state_bytes=cell.state_bytes + _FLOAT32 * (width - 1) * inner,
        activation_bytes_per_token=float(activations),
        working_bytes_per_token=max(
            gating_bytes(inner, bytes_per_element),
            # Gradients of queries, keys, values, of the gate, of the skip and of the cell's output.
            cell_bytes(_cell(config), cell.state_bytes // _FLOAT32, sequence_length)
            + bytes_per_element * 6 * inner
            - freed,
        ),
        # A multiply-add per tap, the bias, and SiLU.
        elementwise_scan_flops_per_token=inner * (2.0 * width + 4),
    )


def _cell(config: MLSTMPreUpConfig) -> MLSTMConfig:
    """The mixer with the same cell, at the inner width."""
    return MLSTMConfig(num_heads=config.num_heads, query_key_factor=1.0, value_factor=1.0, chunk_size=config.chunk_size)


def segment_messages(
    config: MLSTMPreUpConfig, hidden_size: int, segment_length: int, bytes_per_element: int
) -> list[SegmentMessage]:
    """What ranks that hold segments of a sequence say of it: the convolution's last inputs, and what the cell does."""
    inner = config.inner_size(hidden_size)
    window = window_before(inner, config.convolution_width)
    return [window, *cell_messages(_cell(config), inner, segment_length, bytes_per_element)]


def tensor_messages(
    config: MLSTMPreUpConfig, hidden_size: int, bytes_per_element: int, tensor: int, sequence: bool
) -> list[TensorMessage]:
    """Those of the projections, and both gates of each head, whose sums over all channels each rank has a part of."""
    gates = float(_FLOAT32 * 2 * config.num_heads)
    inside = [TensorMessage("reduce_scatter", gates), TensorMessage("all_gather", gates, backward=True)]
    return inside + split_projections(config, hidden_size, bytes_per_element, tensor, sequence)
