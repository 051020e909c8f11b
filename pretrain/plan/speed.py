"""How long a step takes on a GPU of the table: at a stated utilisation, and by what bounds it. Imports no torch.

Both are estimates. The second takes executed FLOPs at a stated share of the peak rate, weights and optimizer at the
rate of memory, what is sent at :data:`LINK_EFFICIENCY` of the links, nothing hidden but what ZeRO-3 sends while layers
compute, and 1F1B's bubble. Latencies are left out, so many small messages take longer than it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config.schema import Config
from pretrain.plan.communication import Traffic
from pretrain.plan.costs import BYTES_PER_ELEMENT, FLOAT32
from pretrain.plan.gpus import GPU
from pretrain.plan.stages import Stage

# What well-tuned runs of dense models reach; scans and small batches reach less.
MODEL_FLOPS_UTILIZATION = 0.4
# Of a link's rate on the data sheet, what large collective calls reach.
LINK_EFFICIENCY = 0.75
# AdamW reads weight, gradient and both moments, and writes all but the gradient.
OPTIMIZER_ELEMENTS_MOVED = 7


@dataclass(frozen=True)
class StepSeconds:
    """Where the time of an optimizer step goes, in seconds.

    Attributes:
        compute: executed FLOPs of the busiest pipeline stage.
        weights: its weights read and cast for each micro-batch, gradients added up, the optimizer's step.
        communication: by :data:`pretrain.plan.communication.PURPOSES`, what is not hidden.
        hidden_communication: what goes on while layers compute.
        bubble: in which a stage waits for the others.
    """

    compute: float
    weights: float
    communication: dict[str, float]
    hidden_communication: float
    bubble: float

    @property
    def total(self) -> float:
        """All together."""
        return self.compute + self.weights + sum(self.communication.values()) + self.bubble


@dataclass(frozen=True)
class Speed:
    """What a run takes on one kind of GPU.

    Attributes:
        model_flops_utilization: the stated share of all GPUs' peak rate that is useful work.
        tokens_per_second, days, gpu_hours: at that utilisation, all GPUs together, for the whole run.
        step: what bounds a step where executed FLOPs run at that share of the peak rate.
        tokens_per_second_unhidden: of that step, in which hardly any communication is hidden.
    """

    model_flops_utilization: float
    tokens_per_second: float
    days: float
    gpu_hours: float
    step: StepSeconds
    tokens_per_second_unhidden: float


def bytes_per_second(traffic: Traffic, config: Config, data_size: int, gpu: GPU) -> float:
    """What a rank of a group sends on the slowest way that it needs, as Megatron-core places ranks on nodes.

    Tensor-parallel ranks are neighbours, then come context-parallel, data-parallel and pipeline ranks. Of a group over
    several nodes, the ranks within a node share the way out: a ring through them uses the adapters of all.
    """
    parallel, ranks = config.parallel, traffic.ranks
    of_model = parallel.tensor * parallel.context
    strides = {
        "tensor": 1,
        "context": parallel.tensor,
        "copies": parallel.tensor,
        "expert": parallel.tensor,
        "expert_copies": parallel.tensor * parallel.expert,
        "pipeline": of_model * data_size,
        "embedding": of_model * data_size * (parallel.pipeline - 1),
    }
    within = max(1, gpu.gpus_per_node // strides[traffic.group])
    if ranks <= within:
        return LINK_EFFICIENCY * gpu.node_link_bytes_per_second
    if traffic.collective in ("send", "all_to_all"):
        # What goes to other nodes goes through the rank's own adapter.
        beyond = 1.0 if traffic.collective == "send" else (ranks - within) / (ranks - 1)
        return LINK_EFFICIENCY * min(gpu.node_link_bytes_per_second, gpu.network_bytes_per_second / beyond)
    return LINK_EFFICIENCY * min(gpu.node_link_bytes_per_second, within * gpu.network_bytes_per_second)


def step_seconds(
    stage: Stage, flops_per_token: float, traffic: Sequence[Traffic], gpu: GPU, utilization: float
) -> StepSeconds:
    """What an optimizer step takes on the ranks of a pipeline stage.

    Args:
        flops_per_token: executed by all tensor-parallel ranks of the stage for each token.
        traffic: of one of its ranks.
        utilization: of the peak rate, while products run.
    """
    config = stage.config
    parallel, micro_batches = config.parallel, stage.micro_batches
    flops = flops_per_token * stage.tokens * micro_batches / parallel.tensor
    compute = flops / (gpu.peak_flops_per_second * utilization)
    if parallel.context > 1 and config.context_scheme == "chain":
        # Each layer waits for the state of the rank before, which goes on with the next.
        layers = len(stage.layers)
        compute *= (layers + parallel.context - 1) / layers
    weights = _bytes_moved(stage) / gpu.memory_bytes_per_second
    shown: Counter[str] = Counter()
    hidden = 0.0
    for entry in traffic:
        seconds = entry.sent / bytes_per_second(entry, config, stage.data_size, gpu)
        if entry.overlaps:
            hidden += seconds
        else:
            shown[entry.purpose] += seconds
    # What products do not cover is waited for.
    if hidden > compute:
        shown["data"] += hidden - compute
        hidden = compute
    of_micro_batches = compute + sum(seconds for purpose, seconds in shown.items() if purpose != "data")
    bubble = of_micro_batches * (parallel.pipeline - 1) / micro_batches
    return StepSeconds(compute, weights, dict(shown), hidden, bubble)


def _bytes_moved(stage: Stage) -> float:
    """To and from memory for weights: each product casts its weight, forward and backward, and adds up a gradient."""
    train = stage.config.train
    element = BYTES_PER_ELEMENT[train.precision]
    # Read in float32 and written, read by the product; the gradient written, read, and added to what is there.
    once = FLOAT32 + 2 * element
    passes = 3 if train.recompute == "block" else 2
    each = passes * once + 2 * element + 2 * FLOAT32
    updated = stage.partition if stage.config.parallel.zero else stage.parameters
    return stage.micro_batches * stage.parameters * each + OPTIMIZER_ELEMENTS_MOVED * FLOAT32 * updated


def busiest(stages: Sequence[tuple[Stage, float, Sequence[Traffic]]], gpu: GPU, utilization: float) -> StepSeconds:
    """The step of the pipeline stage that takes longest; of each stage what :func:`step_seconds` asks for."""
    found = [step_seconds(stage, flops, traffic, gpu, utilization) for stage, flops, traffic in stages]
    return max(found, key=lambda step: step.total)


def estimate_speed(
    step: StepSeconds,
    gpu: GPU,
    utilization: float,
    flops_per_token: float,
    tokens_per_step: int,
    tokens: int,
    ranks: int,
) -> Speed:
    """A run's duration.

    Args:
        step: of the busiest stage.
        utilization: useful FLOPs over the peak rate.
        flops_per_token: useful ones.
        tokens_per_step, tokens: of a step, and of the run.
        ranks: GPUs.
    """
    rate = ranks * gpu.peak_flops_per_second * utilization / flops_per_token
    seconds = tokens / rate
    return Speed(
        model_flops_utilization=utilization,
        tokens_per_second=rate,
        days=seconds / 86400,
        gpu_hours=seconds * ranks / 3600,
        step=step,
        tokens_per_second_unhidden=tokens_per_step / step.total,
    )
