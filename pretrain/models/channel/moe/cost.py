"""What a mixture of experts costs, from its configuration alone. Imports no torch."""

from __future__ import annotations

from pretrain.models.channel.moe.config import MoEConfig
from pretrain.models.registry import MixerCost

FLOAT32, INT64 = 4, 8


def cost(
    config: MoEConfig, hidden_size: int, sequence_length: int, bytes_per_element: int, num_layers: int
) -> MixerCost:
    """Router and shared expert for each token, three products in each expert that it goes through.

    Args:
        config: of the mixer.
        hidden_size: width of the residual stream.
        sequence_length: tokens per sequence; changes nothing here.
        bytes_per_element: of activations.
        num_layers: of the whole model; changes nothing here.
    """
    experts, each, inner = config.num_experts, config.experts_per_token, config.intermediate_size
    expert = 3 * hidden_size * inner
    shared_expert = 3 * hidden_size * (config.shared_expert_size or 0)
    # Weights and biases of the cell that the recurrent routers share.
    size = config.router_size
    cell = {"router_cell": 6 * size * size + 6 * size} if config.router == "recurrent" else {}
    router = size * (hidden_size + experts) if config.router == "recurrent" else experts * hidden_size
    products = router + each * expert + shared_expert + (6 * size * size if cell else 0)
    return MixerCost(
        parameters=router + experts * expert + shared_expert,
        parameters_replicated=router,
        parameters_routed=experts * expert,
        shared_parameters=cell,
        active_parameters=router + each * expert + shared_expert,
        projection_flops_per_token=2.0 * products,
        scan_flops_per_token=0.0,
        executed_scan_flops_per_token=0.0,
        executed_scan_backward_flops_per_token=0.0,
        state_bytes=0,
        activation_bytes_per_token=_activation_bytes(config, hidden_size, bytes_per_element),
        # Gradients of what the experts read, of what they keep inside, and of what they return.
        working_bytes_per_token=float(each * (2 * hidden_size + 4 * inner) * bytes_per_element),
    )


def _activation_bytes(config: MoEConfig, hidden_size: int, bytes_per_element: int) -> float:
    each = config.experts_per_token
    # Each expert's input, its output for the product with the weight, and as in SwiGLU four tensors between them.
    elements = each * (2 * hidden_size + 4 * config.intermediate_size)
    elements += 4 * (config.shared_expert_size or 0)
    # Each expert's weight, in the dtype of the output that it multiplies.
    elements += each
    # Probabilities; those of the chosen, and their sum; for the z loss logits and log-partition.
    floats = config.num_experts + each + 1
    floats += config.num_experts + 1 if config.z_coefficient else 0
    if bytes_per_element != FLOAT32:
        # The router reads a float32 copy. The norm's result, which the block counts, is then the shared expert's alone.
        floats += hidden_size
        elements -= hidden_size if config.shared_expert_size is None else 0
    if config.router == "recurrent":
        # The cell's input, three gates, the state's part of them, and the state that it returns.
        floats += 8 * config.router_size
    # The choice of each token, and the order of rows there and back.
    return float(elements * bytes_per_element + floats * FLOAT32 + 3 * each * INT64)
