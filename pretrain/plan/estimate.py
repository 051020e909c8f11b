"""The plan of a run: parameters, FLOPs, bytes per rank and the pipeline's idle share. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.config.layout import check_world_size
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.plan.communication import Traffic, heaviest_traffic, stage_traffic
from pretrain.plan.context import ContextPlan, plan_context
from pretrain.plan.costs import FLOAT32
from pretrain.plan.gpus import GPUFit, find_gpu, fit
from pretrain.plan.layers import BlockCost, layer_costs, shared_parameters
from pretrain.plan.lengths import FlopsByLength, flops_by_length
from pretrain.plan.peak import peak
from pretrain.plan.speed import MODEL_FLOPS_UTILIZATION, Speed, StepSeconds, busiest, estimate_speed
from pretrain.plan.stages import Stage, pipeline_stages
from pretrain.plan.teacher import TeacherCost, read_teacher

# Settings of ``train.recompute``.
RECOMPUTE = ("none", "block")


@dataclass(frozen=True)
class StagePlan:
    """What one rank of a pipeline stage holds; its tensor- and data-parallel neighbours hold as much.

    Attributes:
        stage: index of the pipeline stage.
        layers: how many layers stand on it.
        parameters: of this rank's part of the model, before ZeRO splits them.
        bytes: the most that it holds at once.
        moment: when, in words; see :mod:`pretrain.plan.peak`.
        bytes_by_part: the same, by the keys of :data:`pretrain.plan.peak.PARTS`.
        bytes_by_moment: the most that it holds at moments of each kind.
        activation_bytes: activations at the heaviest moment for each setting of ``train.recompute``.
        bytes_by_recompute: all that it holds for each setting.
    """

    stage: int
    layers: int
    parameters: int
    bytes: int
    moment: str
    bytes_by_part: dict[str, int]
    bytes_by_moment: dict[str, int]
    activation_bytes: dict[str, int]
    bytes_by_recompute: dict[str, int]


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
        heaviest_moment: the moment of a step at which it holds that much, in words.
        stages: one entry per pipeline stage.
        gpu: how the heaviest rank compares with a GPU; None unless one was named.
        tokens_per_inner_position: how many tokens a position of the innermost network stands for, as expected; 1
            without a hierarchy.
        context: what ranks that hold segments of the same sequences send each other; None where each holds whole ones.
        uncounted_teacher: the checkpoint of a teacher of which nothing here is counted, because it is not there yet;
            None where there is none, or it is counted.
        bytes_per_rank_by_recompute: the most that any rank holds, for each setting of ``train.recompute``.
        save_host_bytes: host memory that asynchronous saves keep on the rank that writes most: weights and both
            moments, float32, of what it writes.
        flops_by_length: useful FLOPs of a token at other lengths.
        traffic: what a rank of the stage that sends most sends in a step.
        speed: how long the run takes; None unless a GPU was named.
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
    heaviest_moment: str
    stages: list[StagePlan]
    gpu: GPUFit | None = None
    tokens_per_inner_position: float = 1.0
    context: ContextPlan | None = None
    uncounted_teacher: str | None = None
    bytes_per_rank_by_recompute: dict[str, int] = field(default_factory=dict)
    save_host_bytes: int = 0
    flops_by_length: FlopsByLength | None = None
    traffic: list[Traffic] = field(default_factory=list)
    speed: Speed | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, ready for JSON."""
        plain = asdict(self)
        for entry, traffic in zip(plain["traffic"], self.traffic, strict=True):
            entry["bytes_sent"] = traffic.sent
        if self.speed is not None:
            plain["speed"]["step"]["total"] = self.speed.step.total
        return plain


def model_flops_per_token(config: Config) -> float:
    """Useful FLOPs of one training token, forward and backward; see :class:`Plan` for what counts."""
    forward = sum(
        layer.positions_per_token * mixer.flops_per_token for layer in layer_costs(config) for mixer in layer.mixers
    )
    return 3.0 * (forward + _head_flops(config))


def hardware_flops_per_token(config: Config, teacher: TeacherCost | None = None) -> float:
    """FLOPs that one training token really takes, masked pairs, padding, recomputation and a teacher's included."""
    taught = teacher.forward_flops_per_token if teacher else 0.0
    return sum(_executed_flops(layer, config) for layer in layer_costs(config)) + 3 * _head_flops(config) + taught


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


def stage_flops_per_token(stage: Stage) -> float:
    """FLOPs that all tensor-parallel ranks of a pipeline stage really do for each token; the head is on the last."""
    head = 3 * _head_flops(stage.config) if stage.is_last else 0.0
    taught = stage.teacher.forward_flops_per_token if stage.teacher else 0.0
    return sum(_executed_flops(layer, stage.config) for layer in stage.layers) + head + taught


def estimate_step(stages: list[Stage], gpu: str, utilization: float) -> StepSeconds:
    """Where the time of a step goes, on the pipeline stage that takes longest."""
    described = [(stage, stage_flops_per_token(stage), stage_traffic(stage)) for stage in stages]
    return busiest(described, find_gpu(gpu)[1], utilization)


def plan(
    config: Config,
    world_size: int | None = None,
    gpu: str | None = None,
    utilization: float = MODEL_FLOPS_UTILIZATION,
) -> Plan:
    """Works out what a run needs, without starting anything.

    Args:
        config: the run.
        world_size: number of processes; None: as many as the layout names (``parallel.data`` left open: as few
            data-parallel ranks as there can be).
        gpu: a name in :data:`pretrain.plan.GPUS` to compare the heaviest rank with.
        utilization: useful FLOPs over the peak rate, of which the run's duration is reckoned.

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
    teacher = read_teacher(config)
    held = pipeline_stages(config, layers, data_size, teacher)
    stages = [_plan_stage(stage) for stage in held]
    heaviest = max(stages, key=lambda stage: stage.bytes)
    embedding = config.model.vocab_size * config.model.embedding_size
    outside_layers = (1 if config.model.tie_embeddings else 2) * embedding + config.model.embedding_size
    outside_layers += shared_parameters(layers)
    flops = model_flops_per_token(config)
    tokens_per_step = train.global_batch_size * config.data.sequence_length
    speed = None
    if gpu is not None:
        tokens, step = tokens_per_step * train.steps, estimate_step(held, gpu, utilization)
        speed = estimate_speed(step, find_gpu(gpu)[1], utilization, flops, tokens_per_step, tokens, world_size)
    return Plan(
        parameters=sum(layer.parameters for layer in layers) + outside_layers,
        active_parameters=sum(layer.active_parameters for layer in layers) + outside_layers,
        embedding_parameters=embedding,
        flops_per_token=flops,
        hardware_flops_per_token=hardware_flops_per_token(config, teacher),
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
        heaviest_moment=heaviest.moment,
        stages=stages,
        gpu=None if gpu is None else fit(gpu, heaviest.bytes, flops, world_size),
        tokens_per_inner_position=1.0 / layers[0].positions_per_token,
        context=plan_context(config, micro_batches),
        uncounted_teacher=config.distillation.teacher if config.distillation and teacher is None else None,
        bytes_per_rank_by_recompute={
            setting: max(stage.bytes_by_recompute[setting] for stage in stages) for setting in RECOMPUTE
        },
        save_host_bytes=max(_save_bytes(stage) for stage in held),
        flops_by_length=flops_by_length(config),
        traffic=heaviest_traffic(held),
        speed=speed,
    )


def _save_bytes(stage: Stage) -> int:
    """Of weights and moments that a rank writes: ranks that hold the same weights share the tensors, none is cut."""
    largest = stage.head_parameters if stage.index == 0 or stage.is_last else 0
    return 3 * FLOAT32 * max(stage.partition, largest)


def _plan_stage(stage: Stage) -> StagePlan:
    most = peak(stage)
    peaks = {setting: peak(_with_recompute(stage, setting)) for setting in RECOMPUTE}
    return StagePlan(
        stage=stage.index,
        layers=sum(not layer.is_joint for layer in stage.layers),
        parameters=stage.parameters,
        bytes=most.bytes,
        moment=most.moment,
        bytes_by_part=most.bytes_by_part,
        bytes_by_moment=most.bytes_by_kind,
        activation_bytes={setting: other.bytes_by_part["activations"] for setting, other in peaks.items()},
        bytes_by_recompute={setting: other.bytes for setting, other in peaks.items()},
    )


def _with_recompute(stage: Stage, setting: str) -> Stage:
    train = stage.config.train.model_copy(update={"recompute": setting})
    return stage.under(stage.config.model_copy(update={"train": train}))
