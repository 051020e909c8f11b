"""Processes and their groups: joins the job, builds Megatron-core's groups, and says where this rank stands."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.config.layout import check_world_size
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.parallel.no_cuda import bridge_cuda_calls

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Topology:
    """Where this process stands.

    Attributes:
        device: that this process computes on.
        rank, world_size: over all processes.
        tensor_rank, pipeline_rank, data_rank: within their groups; ``*_size`` likewise.
        copy_rank: among the ranks that hold the same weights: data-parallel and context-parallel ones together;
            ``copy_size`` counts them.
        expert_data_rank: among the ranks that hold the same experts; ``expert_data_size`` counts them.
    """

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    copy_rank: int
    copy_size: int
    expert_data_rank: int
    expert_data_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(requested: str) -> torch.device:
    """The device of this process; ``auto`` takes CUDA where each process of this machine can have a device.

    Raises:
        InputError: CUDA was asked for and there are too few devices.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "cuda" and devices < processes:
        raise InputError(
            f"train.device=cuda, but torch sees {devices} CUDA devices for {processes} processes on this machine; "
            f"start fewer processes, or set train.device=cpu"
        )
    if requested == "cpu" or devices < processes:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def world_size_of_environment() -> int:
    """Number of processes that the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(device: torch.device) -> None:
    """Joins the default process group; a process started without a launcher is a group of its own."""
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=30)
    if "RANK" in os.environ and world_size_of_environment() > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def build_topology(config: Config) -> Topology:
    """Joins the job and builds the groups of ``config.parallel``, replacing those of an earlier call.

    Raises:
        InputError: the number of processes does not fit the layout.
    """
    problem = check_world_size(config, dist.get_world_size() if dist.is_initialized() else world_size_of_environment())
    if problem:
        raise InputError(problem)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    if config.parallel.tensor > 1:
        # Megatron-core overlaps tensor-parallel collectives with products by the order in which they are queued,
        # which CUDA keeps only within one queue.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = choose_device(config.train.device)
    if device.type == "cpu":
        bridge_cuda_calls()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    join_processes(device)
    parallel = config.parallel
    _build_groups(parallel.tensor, parallel.pipeline, parallel.context, parallel.expert)
    return Topology(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=config.parallel.tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=config.parallel.pipeline,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        copy_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        copy_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        expert_data_rank=parallel_state.get_expert_data_parallel_rank(),
        expert_data_size=parallel_state.get_expert_data_parallel_world_size(),
    )


def _build_groups(tensor: int, pipeline: int, context: int, expert: int) -> None:
    """Megatron-core's groups of this layout; those of another layout are destroyed first, the same are kept.

    Megatron-core forgets its groups without destroying them, and each holds threads and sockets.
    """
    if parallel_state.model_parallel_is_initialized():
        built = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
        )
        if built == (tensor, pipeline, context, expert):
            return
        held: list[dist.ProcessGroup] = []
        for value in list(vars(parallel_state).values()):
            values = value if isinstance(value, list) else [value]
            held += [group for group in values if isinstance(group, dist.ProcessGroup) and group not in held]
        parallel_state.destroy_model_parallel()
        # Some of them Megatron-core has destroyed after all.
        still_there = dist.distributed_c10d._world.pg_map
        for group in held:
            if group is not dist.group.WORLD and group in still_there:
                dist.destroy_process_group(group)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
    )


def megatron_config(config: Config) -> TransformerConfig:
    """Megatron-core's own configuration of the same run; its layers and schedules read it."""
    recompute = {}
    if config.train.recompute == "block":
        # Said to Megatron-core, done by our decoder.
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=config.model.num_layers,
        hidden_size=config.model.hidden_size,
        # Megatron-core checks its own attention's heads against the layout; our mixers check theirs.
        num_attention_heads=config.parallel.tensor,
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        sequence_parallel=config.parallel.sequence,
        pipeline_dtype=PRECISIONS[config.train.precision],
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        # Megatron-core frees a stage's output behind autograd's back, which its own backward call allows for;
        # the output of a block here may share storage with what autograd keeps.
        deallocate_pipeline_outputs=False,
        **recompute,
    )
