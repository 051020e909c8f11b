"""DeepSpeed's ZeRO stages 1, 2 and 3 round Megatron-core's layers and schedules.

Three facts decide the shape of this file:

* The schedule divides the loss by the number of micro-batches, so DeepSpeed is told that there is one.
* Gradients of which each tensor-parallel rank holds a part are summed before ZeRO reduces them: at stage 1 once
  a step, because gradients stay whole on the rank until then (``coalesce_grad_reduction``); at stages 2 and 3 by
  a hook on each such parameter, because every micro-batch's gradients are scattered at once.
* Parameters are float32 and products run in the activations' dtype. DeepSpeed so keeps its float32 path, whose
  accumulation is exact and whose optimizer skips a step that is not finite.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from pretrain.config.schema import Config
from pretrain.models.decoder import Decoder
from pretrain.parallel.engine import MOMENTS, Engine, StepResult

os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
# DeepSpeed insists on a launcher's variable even in a process started without one.
os.environ.setdefault("LOCAL_RANK", "0")

import deepspeed  # noqa: E402 (reads the environment when it is imported)
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

# DeepSpeed's name for the groups of the experts.
_EXPERTS = "experts"


class _ModelParallelUnit:
    """Megatron-core's groups under the names that DeepSpeed asks for.

    The model-parallel group spans tensor *and* pipeline ranks, or each stage would clip by its own norm; the
    model-parallel rank is the tensor rank alone, or parameters that are replicated over tensor ranks would be
    left out of the norm on all stages but the first. The data-parallel group is that of all who hold the same weights,
    those with other segments of the same sequences too.
    """

    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_data_parallel_group = staticmethod(partial(parallel_state.get_data_parallel_group, with_context_parallel=True))
    get_data_parallel_rank = staticmethod(partial(parallel_state.get_data_parallel_rank, with_context_parallel=True))
    get_data_parallel_world_size = staticmethod(
        partial(parallel_state.get_data_parallel_world_size, with_context_parallel=True)
    )

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)


class _EngineWithExperts(deepspeed.DeepSpeedEngine):
    """DeepSpeed looks for MoE layers of its own to know whether there are experts; here there are, in others."""

    has_moe_layers = property(lambda self: True, lambda self, found: None)


def _initialise_with_experts(
    model: Decoder, optimizer: torch.optim.AdamW, config: dict[str, Any], mpu: Any, dist_init_required: bool
) -> tuple[Any, Any, None, None]:
    """``deepspeed.initialize`` for a model whose experts are split over data-parallel ranks.

    DeepSpeed reduces and partitions parameters that are marked so over the ranks that hold them, divides their
    gradients by the whole data-parallel size, and counts each of them once in the norm.
    """
    from deepspeed.utils import groups

    backend = deepspeed.get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=dist_init_required)
    groups._EXPERT_PARALLEL_GROUP[_EXPERTS] = parallel_state.get_expert_model_parallel_group()
    groups._EXPERT_DATA_PARALLEL_GROUP[_EXPERTS] = parallel_state.get_expert_data_parallel_group()
    for group in optimizer.param_groups:
        if all(parameter.spec.expert for parameter in group["params"]):
            group |= {"moe": True, "name": _EXPERTS}
            for parameter in group["params"]:
                parameter.allreduce, parameter.group_name = False, _EXPERTS
    engine = _EngineWithExperts(
        args=None,
        model=model,
        optimizer=optimizer,
        mpu=mpu,
        dist_init_required=dist_init_required,
        config=config,
        config_class=deepspeed.DeepSpeedConfig(config, mpu),
    )
    return engine, engine.optimizer, None, None


def _sum_norms_over_model_parallel_ranks_once(zero: Any) -> None:
    """Makes ZeRO 1 and 2 sum the squared norms of all parameter groups together.

    They sum each group by itself. A pipeline stage need not have the groups of another, which has experts for instance,
    and would then not take part in the other's sums.
    """
    norm_of_rank, sum_over_ranks = zero.scaled_global_norm, zero._model_parallel_all_reduce

    def global_norm() -> Tensor:
        zero._model_parallel_all_reduce = lambda tensor, op: None
        try:
            total = norm_of_rank().square()
        finally:
            zero._model_parallel_all_reduce = sum_over_ranks
        sum_over_ranks(tensor=total, op=dist.ReduceOp.SUM)
        return total.sqrt()

    zero.scaled_global_norm = global_norm


class ZeroEngine(Engine):
    """ZeRO 1, 2 or 3; with pipeline stages, 1."""

    def __init__(self, model: Decoder, optimizer: torch.optim.AdamW, config: Config):
        super().__init__(model, optimizer)
        self.stage = config.parallel.zero
        # DeepSpeed allocates its bucket whole, 2 GB by default, however small the model.
        bucket = min(500_000_000, sum(parameter.numel() for parameter in self.parameters.values()))
        settings = {
            "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.optimizer.gradient_clip,
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": bucket},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            # On the CPU DeepSpeed compiles a shared-memory all-reduce when it starts, which takes a minute and a
            # compiler, and waits for ever where an earlier process was killed while it did; gloo does without.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        initialise = deepspeed.initialize
        if parallel_state.get_expert_model_parallel_world_size() > 1:
            initialise = _initialise_with_experts
        self.engine, self.zero, _, _ = initialise(
            model=model,
            optimizer=optimizer,
            config=settings,
            mpu=_ModelParallelUnit(),
            dist_init_required=False,
        )
        if self.stage < 3:
            _sum_norms_over_model_parallel_ranks_once(self.zero)
        self._create_moments()
        if self.stage >= 2:
            self._sum_partial_gradients_by_hook()
            model.config.no_sync_func = self._not_the_last_micro_batch

    @property
    def model(self) -> nn.Module:
        # DeepSpeed's own forward gathers ZeRO-3 weights and prepares the scattering of ZeRO-2 gradients; at
        # stage 1 the bare module avoids its rescaling of every pipeline stage's output.
        return self.decoder if self.stage == 1 else self.engine

    def _sum_partial_gradients_by_hook(self) -> None:
        if parallel_state.get_tensor_model_parallel_world_size() == 1:
            return
        group = parallel_state.get_tensor_model_parallel_group()

        def summed(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=group)
            return gradient

        for parameter in self.parameters.values():
            if parameter.spec.partial_gradient and parameter.requires_grad:
                parameter.register_hook(summed)

    @contextlib.contextmanager
    def _not_the_last_micro_batch(self) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        if self.stage >= 2:
            yield
            return
        with self.engine.coalesce_grad_reduction():
            yield
            self.sum_partial_gradients()

    def step(self, learning_rate: float) -> StepResult:
        self.set_learning_rate(learning_rate)
        self.engine.step()
        norm = float(self.zero._global_grad_norm)
        return StepResult(norm, math.isfinite(norm) and not self.zero.overflow)

    def read_state(self, name: str, kind: str) -> Tensor | None:
        parameter = self.parameters[name]
        if not parameter.requires_grad:
            return self._read_fixed(parameter) if kind == "weight" else None
        if kind == "weight":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def _read_fixed(self, parameter: nn.Parameter) -> Tensor:
        """A parameter that the optimizer does not know."""
        if self.stage < 3:
            return parameter.detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def read_gradient(self, name: str) -> Tensor | None:
        parameter = self.parameters[name]
        return safe_get_full_grad(parameter) if parameter.requires_grad else None

    def _create_moments(self) -> None:
        """Makes AdamW's state before its first step, as that step would.

        ZeRO 1 and 2 link every parameter to its piece of that state once, after the first parameter group's
        first step, and would miss the groups behind it.
        """
        for partition in self._partitions():
            self.optimizer.state[partition] = {
                "step": torch.tensor(0.0),
                **{kind: torch.zeros_like(partition) for kind in MOMENTS},
            }
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):
            self.zero._lazy_init_hp_params_optimizer_state()

    def write_moments(self, moments: Iterator[tuple[str, dict[str, Tensor]]], steps: int) -> None:
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(float(steps))
        for name, values in moments:
            for kind in MOMENTS:
                parameter = self.parameters[name]
                safe_set_full_optimizer_state(parameter, values[kind].to(self.engine.device), kind)

    def _partitions(self) -> list[Tensor]:
        """Flat float32 tensors that the inner optimizer steps over on this rank."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return self.zero.single_partition_of_fp32_groups
