"""What a mixture of experts costs, from its configuration alone. Imports no torch."""

from __future__ import annotations

from pretrain.models.channel.moe.config import MoEConfig
from pretrain.models.mixer_cost import MixerCost
from pretrain.models.tensor_messages import TensorMessage, split_projections

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
    activations, replicated, by_position = _activation_bytes(config, hidden_size, bytes_per_element)
    # In turn: gradients of the experts' outputs and of those times their weights; within the experts, as in SwiGLU, of
    # the product and its factors; within the shared expert the same.
    returned, inside = 2 * each * hidden_size, 2 * each * inner
    working = max(returned, inside, 2 * (config.shared_expert_size or 0))
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
        activation_bytes_per_token=activations,
        activation_bytes_replicated=replicated,
        activation_bytes_by_position=by_position,
        working_bytes_per_token=float(working * bytes_per_element),
        working_bytes_replicated=float(working * bytes_per_element) if returned == working else 0.0,
        # On a GPU all experts' weights of one name are stacked for one product; the router's cell counts elsewhere.
        parameters_at_once=max(experts * hidden_size * inner, 2 * hidden_size * (config.shared_expert_size or 0)),
    )


def _activation_bytes(config: MoEConfig, hidden_size: int, bytes_per_element: int) -> tuple[float, float, float]:
    """Per token: all; what each tensor-parallel rank keeps of all tokens; what it keeps of those that it routes."""
    each = config.experts_per_token
    # Between an expert's input and its output as in SwiGLU four tensors, whose channels are split.
    split = 4 * (each * config.intermediate_size + (config.shared_expert_size or 0)) * bytes_per_element
    # Each expert's input, its output for the product with the weight, and that weight in the same dtype; the order of
    # rows there and back.
    replicated = each * (2 * hidden_size + 1) * bytes_per_element + 2 * each * INT64
    # The choice; probabilities, those of the chosen, and their sum; for the z loss logits and log-partition. Each
    # position's shares of experts, kept where a row holds several sequences as chunks do, are not counted.
    routed = each * INT64
    floats = config.num_experts + each + 1
    floats += config.num_experts + 1 if config.z_coefficient else 0
    if bytes_per_element != FLOAT32:
        # The router reads a float32 copy. The norm's result, which the block counts, is then the shared expert's alone.
        floats += hidden_size
        routed -= hidden_size * bytes_per_element if config.shared_expert_size is None else 0
    if config.router == "recurrent":
        # The cell's input, three gates, the state's part of them, and the state that it returns.
        floats += 8 * config.router_size
    routed += floats * FLOAT32
    return float(split + replicated + routed), float(replicated), float(routed)


def tensor_messages(
    config: MoEConfig, hidden_size: int, bytes_per_element: int, tensor: int, sequence: bool
) -> list[TensorMessage]:
    """Of the ranks that hold parts of every expert, then of those that hold different experts.

    Each token's rows go to its experts and back, forward and backward; how many stay on their rank is a matter of the
    router, on average as many as it holds experts. How often experts were chosen in a sequence, a few numbers for each
    sequence, is not counted.
    """
    hidden, each = float(hidden_size * bytes_per_element), config.experts_per_token
    weights, choices, rows = float(FLOAT32 * each), float(INT64 * each), each * hidden
    exchanged = [TensorMessage("all_to_all", rows, backward, "expert") for backward in (False, False, True, True)]
    if tensor == 1:
        return exchanged
    if sequence:
        before = [TensorMessage("all_gather", size) for size in (hidden, weights, choices)]
        after = [
            TensorMessage("reduce_scatter", hidden),
            TensorMessage("all_gather", hidden, backward=True),
            TensorMessage("reduce_scatter", hidden, backward=True),
            TensorMessage("reduce_scatter", weights, backward=True),
        ]
    else:
        before = [TensorMessage("broadcast", choices)]
        after = [TensorMessage("all_reduce", hidden)]
        after += [TensorMessage("all_reduce", size, backward=True) for size in (hidden, weights)]
    messages = before + exchanged + after
    if config.shared_expert_size is not None:
        messages += split_projections(config, hidden_size, bytes_per_element, tensor, sequence)
    return messages
