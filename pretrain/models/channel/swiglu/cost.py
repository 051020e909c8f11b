"""What SwiGLU costs, from its configuration alone. Imports no torch."""

from __future__ import annotations

from pretrain.models.channel.swiglu.config import SwiGLUConfig
from pretrain.models.mixer_cost import MixerCost


def cost(
    config: SwiGLUConfig, hidden_size: int, sequence_length: int, bytes_per_element: int, num_layers: int
) -> MixerCost:
    """Three matrix products per token and no work along the sequence.

    Args:
        config: of the mixer.
        hidden_size: width of the residual stream.
        sequence_length: tokens per sequence; changes nothing here.
        bytes_per_element: of activations.
        num_layers: of the whole model; changes nothing here.
    """
    inner = config.inner_size(hidden_size)
    parameters = 3 * hidden_size * inner
    return MixerCost(
        parameters=parameters,
        parameters_replicated=0,
        active_parameters=parameters,
        projection_flops_per_token=2.0 * parameters,
        scan_flops_per_token=0.0,
        executed_scan_flops_per_token=0.0,
        executed_scan_backward_flops_per_token=0.0,
        state_bytes=0,
        # Gate and up (one tensor), silu(gate), and the product that the down projection reads.
        activation_bytes_per_token=4.0 * inner * bytes_per_element,
        # Gradients of the product and of both its factors; the product itself is freed by then.
        working_bytes_per_token=2.0 * inner * bytes_per_element,
        parameters_at_once=2 * hidden_size * inner,
    )
