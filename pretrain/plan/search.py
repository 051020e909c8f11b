"""Which layouts of a number of GPUs a run could have, which of them fit, and which would be fastest. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pydantic

from pretrain.config.checks import sections_problem
from pretrain.config.schema import Config
from pretrain.config.sections import ParallelConfig
from pretrain.errors import InputError
from pretrain.plan.communication import stage_traffic
from pretrain.plan.context import segment_length
from pretrain.plan.estimate import RECOMPUTE, model_flops_per_token, stage_flops_per_token
from pretrain.plan.gpus import GPU, find_gpu, usable_bytes
from pretrain.plan.layers import BlockCost, layer_costs
from pretrain.plan.numbers import format_bytes
from pretrain.plan.peak import heaviest
from pretrain.plan.speed import MODEL_FLOPS_UTILIZATION, StepSeconds, busiest
from pretrain.plan.stages import Stage, pipeline_stages
from pretrain.plan.teacher import read_teacher

ZERO = (0, 1, 2, 3)


@dataclass(frozen=True)
class Layout:
    """The keys of ``parallel`` and ``train`` that a search chooses."""

    tensor: int
    sequence: bool
    pipeline: int
    context: int
    expert: int
    data: int
    zero: Literal[0, 1, 2, 3]
    micro_batch_size: int
    recompute: Literal["none", "block"]

    @property
    def split(self) -> tuple[int, bool, int, int, int]:
        """How it cuts the model and its sequences."""
        return self.tensor, self.sequence, self.pipeline, self.context, self.expert

    def overrides(self) -> dict[str, dict[str, Any]]:
        """The sections of a configuration that it sets."""
        chosen = asdict(self)
        train = {key: chosen.pop(key) for key in ("micro_batch_size", "recompute")}
        # What the configuration says of its stages is for its own number of them.
        return {"parallel": chosen | {"layers_per_stage": None}, "train": train}


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Attributes:
        layout: its keys.
        bytes_per_rank: the most that any rank holds.
        micro_batches: per data-parallel rank and step.
        pipeline_bubble_fraction: share of a step that a stage idles.
        step: where the step's time goes, see :mod:`pretrain.plan.speed`.
        tokens_per_second: of all ranks.
        model_flops_utilization: useful FLOPs of such a step over the peak rate.
    """

    layout: Layout
    bytes_per_rank: int
    micro_batches: int
    pipeline_bubble_fraction: float
    step: StepSeconds
    tokens_per_second: float
    model_flops_utilization: float


@dataclass(frozen=True)
class Refusal:
    """Why layouts are left out, one example in words, and how many they are."""

    reason: str
    layouts: int


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        gpu: key of :data:`pretrain.plan.gpus.GPUS`.
        world_size: GPUs.
        usable_bytes: of each, the margin for drivers and fragmentation left out.
        utilization: share of the peak rate at which products are taken to run.
        layouts: that were looked at; each fits or is counted in a refusal.
        fitting: the fastest first.
        refusals: the most frequent first.
        uncounted_teacher: as :class:`pretrain.plan.estimate.Plan` has it.
    """

    gpu: str
    world_size: int
    usable_bytes: int
    utilization: float
    layouts: int
    fitting: list[Candidate]
    refusals: list[Refusal]
    uncounted_teacher: str | None = None

    def best(self, count: int) -> list[Candidate]:
        """The fastest that cut the model differently: of each cut the best ZeRO stage, micro-batch, recomputation."""
        by_split: dict[tuple[Any, ...], Candidate] = {}
        for candidate in self.fitting:
            by_split.setdefault(candidate.layout.split, candidate)
        return list(by_split.values())[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, ready for JSON."""
        plain = asdict(self)
        for entry, candidate in zip(plain["fitting"], self.fitting, strict=True):
            entry["step"]["total"] = candidate.step.total
        return plain


def with_layout(config: Config, layout: Layout) -> Config:
    """The configuration under another layout; that it is allowed is for the caller to know."""
    sections = layout.overrides()
    parallel = ParallelConfig(**config.parallel.model_dump() | sections["parallel"])
    train = config.train.model_copy(update=sections["train"])
    return config.model_copy(update={"parallel": parallel, "train": train})


def search(config: Config, world_size: int, gpu: str, utilization: float = MODEL_FLOPS_UTILIZATION) -> Search:
    """Tries every layout of so many GPUs.

    Args:
        config: the run; its layout, micro-batch size and recomputation are what is searched for.
        world_size: GPUs, all of which are to be used.
        gpu: a name in :data:`pretrain.plan.GPUS`.
        utilization: of the peak rate, while products run.

    Raises:
        InputError: the GPU is unknown, or there is none.
    """
    if world_size < 1:
        raise InputError(f"the number of GPUs must be at least 1, but is {world_size}")
    key, found = find_gpu(gpu)
    seeking = _Seeking(config, world_size, found, utilization)
    for split in _splits(config, world_size):
        seeking.look_at(*split)
    fitting = sorted(seeking.fitting, key=_rank)
    refusals = [Refusal(reason, count) for reason, count in seeking.refused.values()]
    refusals += [
        Refusal(f"zero={zero}, recompute={recompute}: needs {format_bytes(least)} or more", count)
        for (zero, recompute), (least, count) in sorted(seeking.too_large.items())
    ]
    refusals.sort(key=lambda refusal: -refusal.layouts)
    teacher = config.distillation.teacher if config.distillation and seeking.teacher is None else None
    return Search(key, world_size, usable_bytes(found), utilization, seeking.layouts, fitting, refusals, teacher)


def _rank(candidate: Candidate) -> tuple[float, int, int]:
    """Faster first; of those that differ by less than a tenth of a percent, what cuts less, then what holds less."""
    layout = candidate.layout
    cuts = layout.tensor * layout.pipeline * layout.context * layout.expert
    return float(f"{candidate.step.total:.3e}"), cuts, candidate.bytes_per_rank


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [part for part in range(1, number + 1) if number % part == 0]


def _splits(config: Config, world_size: int) -> Iterator[tuple[int, bool, int, int, int]]:
    """Tensor size, whether the sequence is split with it, pipeline, context and expert size."""
    has_experts = any(block.channel and block.channel.routed_experts() for block in config.model.blocks.values())
    for tensor in divisors(world_size):
        for pipeline in divisors(world_size // tensor):
            for context in divisors(world_size // (tensor * pipeline)):
                data = world_size // (tensor * pipeline * context)
                for expert in divisors(data) if has_experts else [1]:
                    for sequence in (False, True) if tensor > 1 else (False,):
                        yield tensor, sequence, pipeline, context, expert


def _identity(stage: Stage) -> tuple[Any, ...]:
    """Equal for stages that cost the same, but for how many micro-batches are in flight."""
    return stage.index == 0, stage.is_last, *map(id, stage.layers)


def _distinct(stages: list[Stage]) -> list[Stage]:
    """Of stages that cost the same the first, which has most micro-batches in flight."""
    found: dict[tuple[Any, ...], Stage] = {}
    for stage in stages:
        found.setdefault(_identity(stage), stage)
    return list(found.values())


class _Seeking:
    """What a search has found so far."""

    def __init__(self, config: Config, world_size: int, gpu: GPU, utilization: float):
        self.config, self.world_size, self.gpu, self.utilization = config, world_size, gpu, utilization
        self.usable = usable_bytes(gpu)
        self.useful_flops = model_flops_per_token(config)
        self.teacher = read_teacher(config)
        self.layouts = 0
        self.fitting: list[Candidate] = []
        # By its words without numbers: an example, and how many there are.
        self.refused: dict[str, tuple[str, int]] = {}
        # By ZeRO stage and recomputation: the least that is needed, and how many there are.
        self.too_large: dict[tuple[int, str], tuple[int, int]] = {}
        self.costs: dict[tuple[int, int], list[BlockCost]] = {}
        self.flops: dict[tuple[Any, ...], float] = {}

    def look_at(self, tensor: int, sequence: bool, pipeline: int, context: int, expert: int) -> None:
        """All that can be chosen beside how the model is cut."""
        data = self.world_size // (tensor * pipeline * context)
        stages: list[Stage] = []
        batch = self.config.train.global_batch_size
        sizes = divisors(batch // data) if batch % data == 0 else []
        for zero in ZERO:
            count = len(sizes or [1]) * len(RECOMPUTE)
            self.layouts += count
            if not sizes:
                self._refuse(f"train.global_batch_size={batch} does not divide over {data} data-parallel ranks", count)
                continue
            first = Layout(tensor, sequence, pipeline, context, expert, data, zero, sizes[0], "none")
            try:
                config = with_layout(self.config, first)
            except pydantic.ValidationError as error:
                self._refuse(error.errors()[0]["msg"].removeprefix("Value error, "), count)
                continue
            problem = sections_problem(config)
            if problem:
                self._refuse(problem, count)
                continue
            stages = stages or _distinct(pipeline_stages(config, self._layer_costs(config), data, self.teacher))
            self._try_sizes(config, stages, first, sizes)

    def _try_sizes(self, config: Config, stages: list[Stage], first: Layout, sizes: list[int]) -> None:
        fits_whole: set[int] = set()
        for recompute in RECOMPUTE:
            for place, size in enumerate(sizes):
                if size in fits_whole:
                    self._refuse("fits without recomputation, which takes longer", 1)
                    continue
                changed = {"micro_batch_size": size, "recompute": recompute}
                train = config.train.model_copy(update=changed)
                tried = config.model_copy(update={"train": train})
                stages = [stage.under(tried) for stage in stages]
                held = heaviest(stages)
                if held > self.usable:
                    # Larger micro-batches hold more.
                    least, count = self.too_large.get((first.zero, recompute), (held, 0))
                    more = len(sizes) - place
                    self.too_large[first.zero, recompute] = (min(least, held), count + more)
                    break
                if recompute == RECOMPUTE[0]:
                    fits_whole.add(size)
                layout = Layout(*first.split, first.data, first.zero, size, recompute)
                self.fitting.append(self._candidate(layout, stages, held))

    def _candidate(self, layout: Layout, stages: list[Stage], held: int) -> Candidate:
        described = [(stage, self._flops(stage), stage_traffic(stage)) for stage in stages]
        step = busiest(described, self.gpu, self.utilization)
        tokens = self.config.train.global_batch_size * self.config.data.sequence_length
        rate = tokens / step.total
        peak = self.gpu.peak_flops_per_second * self.world_size
        micro_batches = stages[0].micro_batches
        bubble = (layout.pipeline - 1) / (micro_batches + layout.pipeline - 1)
        return Candidate(layout, held, micro_batches, bubble, step, rate, rate * self.useful_flops / peak)

    def _layer_costs(self, config: Config) -> list[BlockCost]:
        """Of all that is searched for, costs of whole layers depend on the segments alone."""
        key = (config.parallel.context, segment_length(config))
        if key not in self.costs:
            self.costs[key] = layer_costs(config)
        return self.costs[key]

    def _flops(self, stage: Stage) -> float:
        key = (stage.config.train.recompute, *_identity(stage))
        if key not in self.flops:
            self.flops[key] = stage_flops_per_token(stage)
        return self.flops[key]

    def _refuse(self, reason: str, count: int) -> None:
        sentence = reason.split(";")[0]
        kind = re.sub(r"\d+", "#", sentence)
        example, before = self.refused.get(kind, (sentence, 0))
        self.refused[kind] = (example, before + count)
