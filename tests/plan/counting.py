"""Counts what one optimizer step sends, where torch hands it to the process groups."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pretrain.parallel import zero as zero_engine
from pretrain.plan.communication import gathered_elements, stage_traffic
from pretrain.plan.layers import layer_costs
from pretrain.plan.stages import pipeline_stages
from tests.configurations import tiny_config
from tests.parallel.programs import one_step, open_engine

# Methods of a process group, as torch has named them: the collective, and which argument has the whole tensor.
_METHODS = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "allgather": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "alltoall": ("all_to_all", 1),
    "send": ("send", 0),
}
# What goes beside the tensors: counts, norms, flags.
FEW_BYTES = 32


def _names() -> dict[str, str]:
    """What each of this rank's groups is for; of those that are one group, the first."""
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "copies": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "expert_copies": parallel_state.get_expert_data_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "embedding": parallel_state.get_embedding_group(check_initialized=False),
    }
    found: dict[str, str] = {}
    for name, group in groups.items():
        if group is not None and group.size() > 1:
            found.setdefault(group.group_name, name)
    return found


@contextlib.contextmanager
def counting(counted: Counter[tuple[str, str]]) -> Iterator[None]:
    """Adds up, by group and collective, the bytes of whole tensors that calls hand over."""
    names = _names()

    def wrap(original: Callable[..., Any], kind: str, place: int) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            size = sum(t.numel() * t.element_size() for t in tree_leaves(arguments[place]) if isinstance(t, Tensor))
            if group.size() > 1 and size >= FEW_BYTES:
                counted[names.get(group.group_name, "world"), kind] += size
            return original(group, *arguments, **options)

        return call

    # As they lie in the class: what getattr gives is no longer bound to its group.
    originals = {name: vars(dist.ProcessGroup)[name] for name in _METHODS if name in vars(dist.ProcessGroup)}
    for name in originals:
        setattr(dist.ProcessGroup, name, wrap(getattr(dist.ProcessGroup, name), *_METHODS[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def counted_and_planned(
    overrides: dict[str, dict[str, Any]], gathers_always: bool = False
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], float]]:
    """What a step of this rank hands over, and what its plan says.

    With ``gathers_always`` ZeRO-3 lets go of all weights after use, as it does of those of large models.
    """
    warnings.simplefilter("ignore")
    config = tiny_config(**overrides)
    with _nothing_persists() if gathers_always else contextlib.nullcontext():
        topology, engine = open_engine(config)
    if config.parallel.zero == 3:
        # DeepSpeed first learns in which order modules run.
        one_step(config, topology, engine, 0)
    counted: Counter[tuple[str, str]] = Counter()
    with counting(counted):
        one_step(config, topology, engine, 1)
    stage = pipeline_stages(config, layer_costs(config), topology.data_size)[topology.pipeline_rank]
    planned: Counter[tuple[str, str]] = Counter()
    for traffic in stage_traffic(stage):
        planned[traffic.group, traffic.collective] += traffic.bytes
    if gathers_always:
        planned["copies", "all_gather"] = 4 * gathered_elements(stage, persistent=0, reuse_distance=0)
    if config.parallel.expert == 1:
        # Without expert parallelism they are the same ranks.
        counted["copies", "all_reduce"] += counted.pop(("expert_copies", "all_reduce"), 0)
    return {key: size for key, size in counted.items() if size}, dict(planned)


@contextlib.contextmanager
def _nothing_persists() -> Iterator[None]:
    initialise = zero_engine.deepspeed.initialize

    def with_thresholds(config: dict[str, Any], **options: Any) -> Any:
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
        return initialise(config=config, **options)

    zero_engine.deepspeed.initialize = with_thresholds
    try:
        yield
    finally:
        zero_engine.deepspeed.initialize = initialise
