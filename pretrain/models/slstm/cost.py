"""What the sLSTM costs, from its configuration alone. Imports no torch.

The recurrent weights multiply the hidden state once per token: that product is the work along the sequence, and it is
executed as counted, forward once and backward twice (for the hidden states, and for the weights). The cell's
elementwise work counts an operation on one element as one FLOP, an exponential, logarithm or division too.
"""

from __future__ import annotations

from pretrain.models.mixer_cost import MixerCost
from pretrain.models.slstm.config import SLSTMConfig
from pretrain.models.tensor_messages import TensorMessage

_FLOAT32 = 4

# Of one channel, in unstabilised terms: four sums with what feeds back and with the bias (8); logsigmoid of the
# forget gate and its sum (4), weight of the token (3), logarithm of the normalizer (4); tanh (4); the mean (3);
# sigmoid of the output gate and product (4).
CELL_FLOPS = 30


def cost(
    config: SLSTMConfig, hidden_size: int, sequence_length: int, bytes_per_element: int, num_layers: int
) -> MixerCost:
    """Costs of one sLSTM layer; ``num_layers`` changes nothing.

    Args:
        config: of the mixer.
        hidden_size: width of the residual stream.
        sequence_length: tokens per sequence.
        bytes_per_element: of activations.
        num_layers: of the whole model.
    """
    head = hidden_size // config.num_heads
    weights = 4 * hidden_size * head
    width = config.convolution_width
    convolution = hidden_size * (width + 1) if width else 0
    # Input weights, recurrent weights, biases of the gates, norm, convolution.
    parameters = 2 * weights + 4 * hidden_size + hidden_size + convolution
    recurrent = 2.0 * weights
    convolution_flops = hidden_size * (2.0 * width + 4) if width else 0.0
    cast_copy = 0 if bytes_per_element == _FLOAT32 else _FLOAT32
    activations = hidden_size * (
        # This rank's channels of the input, and the convolved ones.
        bytes_per_element * (2 if width else 1)
        # What the cell keeps of each token: its gates' activations and the mean, float32; and its output.
        + 5 * _FLOAT32
        + bytes_per_element
        # The output's float32 copy for the norm where it is not float32 itself, and normalised.
        + cast_copy
        + _FLOAT32
    )
    # The norm's mean and scale of each head.
    activations += 2 * _FLOAT32 * config.num_heads
    return MixerCost(
        parameters=parameters,
        parameters_replicated=0,
        active_parameters=parameters,
        projection_flops_per_token=2.0 * weights,
        scan_flops_per_token=recurrent,
        executed_scan_flops_per_token=recurrent,
        executed_scan_backward_flops_per_token=2 * recurrent,
        state_bytes=_FLOAT32 * hidden_size * (4 + max(width - 1, 0)),
        activation_bytes_per_token=float(activations),
        # Gradients of the gates, again by head with the hidden states for the recurrent weights' product, and
        # those of the cell's output, once in float32; the norm's float32 input and result are freed by then.
        working_bytes_per_token=float(hidden_size * (10 * bytes_per_element - cast_copy)),
        elementwise_scan_flops_per_token=convolution_flops + CELL_FLOPS * hidden_size,
    )


def tensor_messages(
    config: SLSTMConfig, hidden_size: int, bytes_per_element: int, tensor: int, sequence: bool
) -> list[TensorMessage]:
    """Each rank's channels of the input are a slice, or exchanged for its positions; so are those of the output."""
    size = float(hidden_size * bytes_per_element)
    if not sequence:
        return [TensorMessage("all_gather", size), TensorMessage("all_gather", size, backward=True)]
    return [TensorMessage("all_to_all", size / tensor, backward) for backward in (False, False, True, True)]
