"""What attention computes without its softmax: linear maps of each query head, as recurrent layers take them over.

With queries ``q``, keys ``k`` and values ``v`` of a head, attention without softmax and positions is the recurrence
``S_t = S_{t-1} + v_t k_t^T``, ``y_t = S_t q_t`` (Katharopoulos et al. 2020, arXiv 2006.16236), which state-space layers
and the mLSTM have with gates. So a layer of theirs may start from attention's own maps (Wang et al. 2024, "The Mamba in
the Llama", arXiv 2408.15237, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pretrain.models.attention.config import AttentionConfig

# A recurrent layer forgets, where attention chooses: its heads forget after so many tokens, the first head the
# soonest, each next one by a constant factor later.
MEMORY_OF_HEADS = (4.0, 1024.0)


@dataclass(frozen=True)
class LinearMaps:
    """The maps of an attention layer, for as many heads as there are queries.

    Attributes:
        query, key, value: ``(heads * head_size, hidden_size)``. Keys and values that query heads share are repeated;
            the factor of the scores is in the query.
        output: ``(hidden_size, heads * head_size)``.
        biases: of query, key and value, ``(heads * head_size,)``; empty where there are none.
        value_scale: ``(heads * head_size,)``, for each channel its head's root mean square of values where the layer's
            input is white noise of unit variance.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    biases: Mapping[str, Tensor]
    value_scale: Tensor


def linear_maps(config: AttentionConfig, hidden_size: int, weights: Mapping[str, Tensor]) -> LinearMaps:
    """The maps of an attention layer.

    Norms of queries and keys are left out, their weights are in the maps; so are rotary positions.

    Args:
        weights: of the layer, whole, by name within the mixer.
    """
    head_size, shared = config.size_of_head(hidden_size), config.num_heads // config.key_value_heads
    scale = head_size**-0.5 if config.softmax_scale is None else config.softmax_scale
    rows: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for name in ("query", "key", "value"):
        factor = weights.get(f"{name}_norm_weight")
        parts = {"weight": weights[f"projections.{name}_weight"]}
        if config.bias:
            parts["bias"] = weights[f"{name}_bias"]
        for part, tensor in parts.items():
            heads = tensor.unflatten(0, (-1, head_size))
            if factor is not None:
                heads = heads * factor.view(-1, *[1] * (heads.dim() - 2))
            if name == "query":
                heads = heads * scale
            else:
                heads = heads.repeat_interleave(shared, 0)
            (rows if part == "weight" else biases)[name] = heads.flatten(0, 1)
    squares = rows["value"].square().sum(1).unflatten(0, (-1, head_size))
    value_scale = squares.mean(1, keepdim=True).sqrt().expand_as(squares).flatten()
    return LinearMaps(**rows, output=weights["output.weight"], biases=biases, value_scale=value_scale)
