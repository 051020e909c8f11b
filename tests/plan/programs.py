"""What the processes of a pool measure for plans."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from pretrain.models.parameters import initialise_weights
from pretrain.plan import plan
from pretrain.plan.layers import layer_costs
from tests.configurations import tiny_config
from tests.plan.measuring import build, bytes_kept
from tests.plan.peaks import most_held


def kept_and_planned(model: dict[str, Any], parallel: dict[str, Any], precision: str) -> tuple[float, float]:
    """Bytes that the first block keeps on this rank per token of the sequence, and those that a plan foretells."""
    config = tiny_config(model=model, parallel=parallel, train={"precision": precision})
    decoder = build(config)
    initialise_weights(decoder, 0)
    # Megatron-core gathers into one buffer for all layers, which the longest sequence makes as large as it gets.
    _, short, long = (bytes_kept(decoder, length, batch=2) for length in (192, 64, 192))
    # The difference between two lengths leaves out what does not grow with them.
    return (long - short) / (2 * 128), layer_costs(config)[0].activation_bytes_per_token(config)


def held_and_planned(overrides: dict[str, dict[str, Any]]) -> tuple[int, int]:
    """The most that this rank holds in a step, and what a plan says of the heaviest one, in bytes."""
    config = tiny_config(**overrides)
    held, _ = most_held(config)
    return held, plan(config, dist.get_world_size()).bytes_per_rank
