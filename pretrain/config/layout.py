"""Whether a model, its data and a number of processes fit a layout. Imports no torch."""

from __future__ import annotations

from pretrain.config.model import ModelConfig
from pretrain.config.sections import Sections
from pretrain.config.stages import stages_problem


def layout_problem(config: Sections) -> str | None:
    """Why the model or its data cannot be split as the layout says, in one sentence; None where they can."""
    model, parallel = config.model, config.parallel
    problem = stages_problem(model.num_layers, parallel.pipeline, parallel.layers_per_stage)
    if problem:
        return problem
    for key, length in config.sequence_lengths():
        if parallel.sequence and length % parallel.tensor:
            return (
                f"{key}={length} is not divisible by parallel.tensor={parallel.tensor}, which parallel.sequence=true "
                f"needs"
            )
    if model.hierarchy is not None:
        hierarchy = model.hierarchy
        problem = hierarchy.layout_problem(parallel.pipeline, parallel.sequence)
        problem = problem or hierarchy.tensor_problem(parallel.tensor)
        if problem:
            return f"model.hierarchy: {problem}"
    problem = model.block_problem(parallel.tensor)
    if problem:
        return f"model.{problem}"
    return _context_problem(config) or _expert_problem(model, parallel.expert)


def _context_problem(config: Sections) -> str | None:
    model, parallel = config.model, config.parallel
    context_parallel = parallel.context
    if context_parallel == 1:
        return None
    if model.hierarchy is not None:
        return (
            f"parallel.context={context_parallel} does not go with model.hierarchy: a chunk or word may reach over the "
            f"end of a segment, and is not handed on; set parallel.context to 1"
        )
    waiting = model.mixers_that_wait()
    if parallel.zero >= 2 and (waiting or config.context_scheme == "chain"):
        why = f"its {', '.join(waiting)} layers" if waiting else "with parallel.context_scheme=chain all layers"
        return (
            f"parallel.zero={parallel.zero} does not go with parallel.context={context_parallel} for this model: "
            f"{why} wait for the state of the rank before, and collective calls of ZeRO-{parallel.zero} in between "
            f"would wait for ever; use zero=0 or zero=1, or context=1"
        )
    problem = _routed_segments_problem(config, waiting)
    if problem:
        return problem
    for name, block in model.blocks.items():
        if block.mixer is None or config.context_scheme == "chain" or not block.mixer.exchanges_segments:
            continue
        shortest = block.mixer.shortest_segment()
        for key, length in config.sequence_lengths():
            segment = parallel.segment_length(length)
            if segment < shortest:
                return (
                    f"{key}={length} over parallel.context={context_parallel} ranks leaves {segment} tokens a rank, "
                    f"and the convolution of model.blocks.{name}.mixer looks back {shortest}; use fewer ranks, longer "
                    f"sequences, or parallel.context_scheme=chain"
                )
    return None


def _routed_segments_problem(config: Sections, waiting: list[str]) -> str | None:
    """Why routed experts, whose balance loss is of whole sequences, cannot see those in segments."""
    parallel = config.parallel
    for name, block in config.model.blocks.items():
        if block.channel is None or not block.channel.routed_experts():
            continue
        start = f"parallel.context={parallel.context} does not go with the routed experts of model.blocks.{name}"
        if waiting or config.context_scheme == "chain":
            return (
                f"{start}: ranks add up which experts a sequence chose, and would wait for ever for those that wait "
                f"for the state of the rank before ({', '.join(waiting) or 'parallel.context_scheme=chain'}); use "
                f"mixers and a scheme that exchange states, or set parallel.context to 1"
            )
        for key, length in config.sequence_lengths():
            even = parallel.context * parallel.segment_multiple
            if length % even:
                return (
                    f"{start}: {key}={length} is not divisible by {even}, and what fills up the "
                    f"last segment would choose experts; change {key} or parallel.context"
                )
    return None


def _expert_problem(model: ModelConfig, expert_parallel: int) -> str | None:
    if expert_parallel == 1:
        return None
    counts = {name: block.channel.routed_experts() for name, block in model.blocks.items() if block.channel}
    if not any(counts.values()):
        return f"parallel.expert={expert_parallel}, but no block of the model has routed experts; set it to 1"
    for name, count in counts.items():
        if count % expert_parallel:
            return (
                f"model.blocks.{name}.channel: its {count} experts are not divisible by "
                f"parallel.expert={expert_parallel}; every rank holds the same number of experts"
            )
    return None


def check_world_size(config: Sections, world_size: int) -> str | None:
    """Why this many processes do not fit the layout, in one sentence; None where they do."""
    parallel, train = config.parallel, config.train
    if world_size % parallel.model_parallel:
        return (
            f"{world_size} processes cannot hold parallel.tensor={parallel.tensor} x "
            f"parallel.pipeline={parallel.pipeline} x parallel.context={parallel.context} = "
            f"{parallel.model_parallel} ranks a whole number of times; "
            f"start a multiple of {parallel.model_parallel} processes or change the layout"
        )
    data_parallel = world_size // parallel.model_parallel
    if data_parallel % parallel.expert:
        return (
            f"{world_size} processes leave {data_parallel} data-parallel ranks, which parallel.expert="
            f"{parallel.expert} does not divide; start a multiple of {parallel.model_parallel * parallel.expert} "
            f"processes or change the layout"
        )
    if parallel.data is not None and parallel.data != data_parallel:
        return (
            f"parallel.data={parallel.data}, but {world_size} processes over {parallel.model_parallel} ranks a "
            f"model leave {data_parallel}; start {parallel.data * parallel.model_parallel} processes, or set "
            f"parallel.data to {data_parallel} or null"
        )
    if train.global_batch_size % (train.micro_batch_size * data_parallel):
        return (
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {data_parallel} data-parallel ranks; change one of them or the number "
            f"of processes"
        )
    return None
