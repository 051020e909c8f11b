"""Which layers each pipeline stage holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def layers_of_stages(num_layers: int, stages: int, sizes: Sequence[int] | None = None) -> list[range]:
    """Layers of each pipeline stage, in order.

    Args:
        num_layers: of the model, at least one a stage.
        stages: how many there are.
        sizes: layers of each; None: as even as can be, and the first stages have one more, since the last one has the
            output head too.
    """
    if sizes is None:
        each, more = divmod(num_layers, stages)
        sizes = [each + (stage < more) for stage in range(stages)]
    return [range(first, end) for first, end in pairwise(accumulate(sizes, initial=0))]


def stages_problem(num_layers: int, stages: int, sizes: Sequence[int] | None) -> str | None:
    """Why so many layers cannot stand on these stages, in one sentence; None where they can."""
    if num_layers < stages:
        return (
            f"model.num_layers={num_layers} is fewer than parallel.pipeline={stages} stages; each needs a layer, so "
            f"use a smaller pipeline"
        )
    if sizes is None:
        return None
    if len(sizes) != stages:
        return (
            f"parallel.layers_per_stage has {len(sizes)} numbers, but parallel.pipeline={stages}; give one for each "
            f"stage, or null for an even split"
        )
    if sum(sizes) != num_layers:
        return (
            f"parallel.layers_per_stage adds up to {sum(sizes)}, but model.num_layers={num_layers}; change either, or "
            f"give null for an even split"
        )
    return None
