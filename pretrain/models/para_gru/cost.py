"""What ParaGRU costs, from its configuration alone. Imports no torch."""

from __future__ import annotations

from pretrain.models.mixer_cost import MixerCost
from pretrain.models.newton_config import block_cost, block_messages, block_tensor_messages
from pretrain.models.para_gru.config import ParaGRUConfig
from pretrain.models.segment_messages import SegmentMessage

# Of one step per channel: two gates of a multiply-add, the candidate's a multiplication more, the blend of old
# and new state as an addition to the old, and three nonlinearities.
CELL_FLOPS = 2 * 2 + 3 + 3 + 3

# What tensor-parallel ranks say is the block's alone.
tensor_messages = block_tensor_messages


def cost(
    config: ParaGRUConfig, hidden_size: int, sequence_length: int, bytes_per_element: int, num_layers: int
) -> MixerCost:
    """Costs of one ParaGRU layer.

    Args:
        config: of the mixer.
        hidden_size: width of the residual stream.
        sequence_length: tokens per sequence; changes nothing here.
        bytes_per_element: of activations.
        num_layers: of the whole model; changes nothing here.
    """
    return block_cost(config, hidden_size, bytes_per_element, state_size=1, peepholes=0, cell_flops=CELL_FLOPS)


def segment_messages(
    config: ParaGRUConfig, hidden_size: int, segment_length: int, bytes_per_element: int
) -> list[SegmentMessage]:
    """What ranks that hold segments of a sequence say of it; see :func:`block_messages`."""
    return block_messages(config, hidden_size, state_size=1)
