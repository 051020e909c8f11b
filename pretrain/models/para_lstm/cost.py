"""What ParaLSTM costs, from its configuration alone. Imports no torch."""

from __future__ import annotations

from pretrain.models.mixer_cost import MixerCost
from pretrain.models.newton_config import block_cost, block_messages, block_tensor_messages
from pretrain.models.para_lstm.config import ParaLSTMConfig
from pretrain.models.segment_messages import SegmentMessage

# Of one step per channel: two gates of two multiply-adds and the candidate of one, the blend of old and new cell
# as an addition to the new, the output gate's product, and four nonlinearities.
CELL_FLOPS = 2 * 4 + 2 + 3 + 1 + 4

# What tensor-parallel ranks say is the block's alone.
tensor_messages = block_tensor_messages


def cost(
    config: ParaLSTMConfig, hidden_size: int, sequence_length: int, bytes_per_element: int, num_layers: int
) -> MixerCost:
    """Costs of one ParaLSTM layer.

    Args:
        config: of the mixer.
        hidden_size: width of the residual stream.
        sequence_length: tokens per sequence; changes nothing here.
        bytes_per_element: of activations.
        num_layers: of the whole model; changes nothing here.
    """
    return block_cost(config, hidden_size, bytes_per_element, state_size=2, peepholes=2, cell_flops=CELL_FLOPS)


def segment_messages(
    config: ParaLSTMConfig, hidden_size: int, segment_length: int, bytes_per_element: int
) -> list[SegmentMessage]:
    """What ranks that hold segments of a sequence say of it; see :func:`block_messages`."""
    return block_messages(config, hidden_size, state_size=2)
