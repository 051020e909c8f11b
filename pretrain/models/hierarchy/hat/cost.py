"""What HAT's bytes cost beside their blocks, from the configuration alone. Imports no torch.

How many words there are is the text's matter, so costs are those expected where a word has ``bytes_per_word`` bytes.
"""

from __future__ import annotations

from pretrain.models.hierarchy.hat.config import HATConfig
from pretrain.models.mixer_cost import MixerCost, OuterCost

_FLOAT32 = 4


def outer_costs(config: HATConfig, hidden_size: int, bytes_per_element: int) -> list[OuterCost]:
    """Blocks of encoder and decoder, and what joins them with the backbone, per byte and per word.

    Args:
        config: of the hierarchy.
        hidden_size: width of the backbone.
        bytes_per_element: of activations.
    """
    size, words, element = config.hidden_size, 1.0 / config.bytes_per_word, bytes_per_element
    costs = [
        OuterCost(size, 1.0, block=name, place=f"hierarchy.{part}")
        for part in ("encoder", "decoder")
        for name in getattr(config, part)
    ]
    # Kept at each byte: key and value, both in the order of rows, in float32 as far as they are not already, the
    # weighted value, and weights of heads; at each word: the pooled vector before and after its division.
    cast = 0 if element == _FLOAT32 else _FLOAT32
    pooling = size * (2.0 * element + 2.0 * cast) + 3.0 * _FLOAT32 * config.num_heads
    pooled = size * (2.0 * _FLOAT32 + element) + hidden_size * element
    costs.append(OuterCost(size, 1.0, joint=_cost(2 * size * size, size, 0, pooling, 4.0 * size), norms=1))
    costs.append(OuterCost(hidden_size, words, joint=_cost(size * hidden_size, hidden_size, hidden_size, pooled, 0.0)))
    readers = 1 if config.read_words == "first" else len(config.decoder)
    # At each byte: the gate before and after its sigmoid, the word's part, and their product.
    read = size * (element + 2.0 * _FLOAT32 + cast + element)
    for _ in range(readers):
        costs.append(OuterCost(size, 1.0, joint=_cost(2 * size * size, 0, 0, read, 0.0), norms=1))
        costs.append(OuterCost(hidden_size, words, joint=_cost(size * hidden_size, 0, 0, size * element, 0.0), norms=1))
    return costs


def _cost(weights: int, others: int, replicated: int, activation_bytes: float, elementwise: float) -> MixerCost:
    """Costs per position: of ``weights`` in products, and ``others``, of which ``replicated`` are on every rank."""
    return MixerCost(
        parameters=weights + others,
        parameters_replicated=replicated,
        active_parameters=weights + others,
        projection_flops_per_token=2.0 * weights,
        scan_flops_per_token=0.0,
        executed_scan_flops_per_token=0.0,
        executed_scan_backward_flops_per_token=0.0,
        state_bytes=0,
        activation_bytes_per_token=activation_bytes,
        # The gradient of what is kept.
        working_bytes_per_token=activation_bytes,
        elementwise_scan_flops_per_token=elementwise,
    )
