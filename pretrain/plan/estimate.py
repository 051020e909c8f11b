"""The plan of a run: parameters, FLOPs, bytes per rank and the pipeline's idle share. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config.layout import check_world_size
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.plan.context import ContextPlan, plan_context
from pretrain.plan.gpus import GPUFit, fit
from pretrain.plan.memory import BlockCost, Stage, layer_costs, pipeline_stages, shared_parameters


@dataclass(frozen=True)
class StagePlan:
    """What one rank of a pipeline stage holds; its tensor- and data-parallel neighbours hold as much.

    Attributes:
        stage: index of the pipeline stage.
        layers: how many layers stand on it.
        parameters: of this rank's part of the model, before ZeRO splits them.
        bytes: the most that it holds at once.
        bytes_by_part: the same, by the keys of :data:`pretrain.plan.memory.PARTS`.
        activation_bytes: activations alone for each setting of ``train.recompute``.
    """

    stage: int
    layers: int
    parameters: int
    bytes: int
    bytes_by_part: dict[str, int]
    activation_bytes: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    FLOPs are those of matrix products, a multiply-add as two, forward and backward for one training token. Of a model
    that chooses its own chunks they, and activations, are what is expected where it meets its target ratios.

    Attributes:
        parameters: trainable parameters of the whole model.
        active_parameters: those that one token uses.
        embedding_parameters: those of the embedding, which costs no FLOPs.
        flops_per_token: useful work: products with weights, and along the sequence only pairs that may see
            each other; backward twice the forward; nothing that is computed again. Utilisation (MFU) is
            reckoned from this.
        hardware_flops_per_token: what is really multiplied, with masked pairs and recomputation.
        world_size: processes.
        layout: parallel sizes and the ZeRO stage.
        micro_batches: per data-parallel rank and optimizer step.
        tokens_per_step, training_tokens: of the global batch, and of the whole run.
        training_flops: useful work of the whole run.
        pipeline_bubble_fraction: share of a step that a stage idles under 1F1B,
            ``(stages - 1) / (micro_batches + stages - 1)`` (Narayanan et al. 2021, arXiv 2104.04473).
        bytes_per_rank: the most that the heaviest rank holds at once.
        bytes_per_rank_by_part: the same by part; the parts add up to it.
        heaviest_stage: the pipeline stage that this rank is on.
        stages: one entry per pipeline stage.
        gpu: how the heaviest rank compares with a GPU; None unless one was named.
        tokens_per_inner_position: how many tokens a position of the innermost network stands for, as expected; 1
            without a hierarchy.
        context: what ranks that hold segments of the same sequences send each other; None where each holds whole ones.
        uncounted_teacher: the checkpoint of a teacher, of which nothing here is counted; None where there is none.
    """

    parameters: int
    active_parameters: int
    embedding_parameters: int
    flops_per_token: float
    hardware_flops_per_token: float
    world_size: int
    layout: dict[str, int | bool]
    micro_batches: int
    tokens_per_step: int
    training_tokens: int
    training_flops: float
    pipeline_bubble_fraction: float
    bytes_per_rank: int
    bytes_per_rank_by_part: dict[str, int]
    heaviest_stage: int
    stages: list[StagePlan]
    gpu: GPUFit | None = None
    tokens_per_inner_position: float = 1.0
    context: ContextPlan | None = None
    uncounted_teacher: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, ready for JSON."""
        return asdict(self)


def model_flops_per_token(config: Config) -> float:
    """Useful FLOPs of one training token, forward and backward; see :class:`Plan` for what counts."""
    forward = sum(
        layer.positions_per_token * mixer.flops_per_token for layer in layer_costs(config) for mixer in layer.mixers
    )
    return 3.0 * (forward + _head_flops(config))


def hardware_flops_per_token(config: Config) -> float:
    """FLOPs that one training token really takes, masked pairs, padding and recomputation included."""
    return sum(_executed_flops(layer, config) for layer in layer_costs(config)) + 3 * _head_flops(config)


def _executed_flops(layer: BlockCost, config: Config) -> float:
    again = config.train.recompute == "block" and not layer.is_joint
    total = 0.0
    for mixer in layer.mixers:
        products, elementwise = mixer.projection_flops_per_token, mixer.elementwise_scan_flops_per_token
        forward = products + mixer.executed_scan_flops_per_token + elementwise
        backward = 2 * (products + elementwise) + mixer.executed_scan_backward_flops_per_token
        total += (2 if again else 1) * forward + backward
    return layer.positions_per_token * total


def _head_flops(config: Config) -> float:
    return 2.0 * config.model.vocab_size * config.model.embedding_size


def plan(config: Config, world_size: int | None = None, gpu: str | None = None) -> Plan:
    """Works out what a run needs, without starting anything.

    Args:
        config: the run.
        world_size: number of processes; None: as many as the layout names (``parallel.data`` left open: as few
            data-parallel ranks as there can be).
        gpu: a name in :data:`pretrain.plan.GPUS` to compare the heaviest rank with.

    Raises:
        InputError: the number of processes does not fit the layout, or the GPU is unknown.
    """
    parallel, train = config.parallel, config.train
    if world_size is None:
        world_size = parallel.model_parallel * (parallel.data or parallel.expert)
    problem = None if world_size > 0 else f"the number of processes must be at least 1, but is {world_size}"
    problem = problem or check_world_size(config, world_size)
    if problem:
        raise InputError(problem)
    data_size = world_size // parallel.model_parallel
    layers = layer_costs(config)
    micro_batches = train.global_batch_size // (train.micro_batch_size * data_size)
    stages = [_plan_stage(stage) for stage in pipeline_stages(config, layers, data_size)]
    heaviest = max(stages, key=lambda stage: stage.bytes)
    embedding = config.model.vocab_size * config.model.embedding_size
    outside_layers = (1 if config.model.tie_embeddings else 2) * embedding + config.model.embedding_size
    outside_layers += shared_parameters(layers)
    flops = model_flops_per_token(config)
    tokens_per_step = train.global_batch_size * config.data.sequence_length
    return Plan(
        parameters=sum(layer.parameters for layer in layers) + outside_layers,
        active_parameters=sum(layer.active_parameters for layer in layers) + outside_layers,
        embedding_parameters=embedding,
        flops_per_token=flops,
        hardware_flops_per_token=hardware_flops_per_token(config),
        world_size=world_size,
        layout={
            "tensor": parallel.tensor,
            "sequence": parallel.sequence,
            "pipeline": parallel.pipeline,
            "expert": parallel.expert,
            "data": data_size,
            "context": parallel.context,
            "zero": parallel.zero,
        },
        micro_batches=micro_batches,
        tokens_per_step=tokens_per_step,
        training_tokens=tokens_per_step * train.steps,
        training_flops=flops * tokens_per_step * train.steps,
        pipeline_bubble_fraction=(parallel.pipeline - 1) / (micro_batches + parallel.pipeline - 1),
        bytes_per_rank=heaviest.bytes,
        bytes_per_rank_by_part=heaviest.bytes_by_part,
        heaviest_stage=heaviest.stage,
        stages=stages,
        gpu=None if gpu is None else fit(gpu, heaviest.bytes, flops, world_size),
        tokens_per_inner_position=1.0 / layers[0].positions_per_token,
        context=plan_context(config, micro_batches),
        uncounted_teacher=None if config.distillation is None else config.distillation.teacher,
    )


def _plan_stage(stage: Stage) -> StagePlan:
    parts = stage.bytes_by_part()
    return StagePlan(
        stage=stage.index,
        layers=sum(not layer.is_joint for layer in stage.layers),
        parameters=stage.parameters,
        bytes=sum(parts.values()),
        bytes_by_part=parts,
        activation_bytes={setting: stage.activation_bytes(setting) for setting in ("none", "block")},
    )
