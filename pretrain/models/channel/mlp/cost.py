"""What an MLP costs, from its configuration alone. Imports no torch."""

from __future__ import annotations

from pretrain.models.channel.mlp.config import MLPConfig
from pretrain.models.mixer_cost import MixerCost


def cost(
    config: MLPConfig, hidden_size: int, sequence_length: int, bytes_per_element: int, num_layers: int
) -> MixerCost:
    """Two matrix products per token, or three where gated, and no work along the sequence.

    Args:
        config: of the mixer.
        hidden_size: width of the residual stream.
        sequence_length: tokens per sequence; changes nothing here.
        bytes_per_element: of activations.
        num_layers: of the whole model; changes nothing here.
    """
    inner = config.inner_size(hidden_size)
    parameters = (3 if config.gated else 2) * hidden_size * inner
    # What the down projection reads, and what the activation keeps: its input, or its rectified input.
    kept = 2
    if config.gated:
        # Gate and up are one tensor, which stays for up's sake; the product needs the activated gate too.
        kept = 5 if config.activation == "relu_squared" else 4
    # Beyond what is freed, gradients of a gate and of what it scales; of a square, both its steps' and their factor.
    working = 2 if config.gated else (3 if config.activation == "relu_squared" else 1)
    return MixerCost(
        parameters=parameters,
        parameters_replicated=0,
        active_parameters=parameters,
        projection_flops_per_token=2.0 * parameters,
        scan_flops_per_token=0.0,
        executed_scan_flops_per_token=0.0,
        executed_scan_backward_flops_per_token=0.0,
        state_bytes=0,
        activation_bytes_per_token=float(kept * inner * bytes_per_element),
        working_bytes_per_token=float(working * inner * bytes_per_element),
        parameters_at_once=(2 if config.gated else 1) * hidden_size * inner,
    )
