"""The optimizer step over many ranks, behind one interface: replicated (ZeRO 0) or DeepSpeed (ZeRO 1-3).

Megatron-core's schedule owns the micro-batches; an engine owns what happens to gradients after them: sums over
tensor-parallel and data-parallel ranks, one global norm, clipping, the update, and where its state is kept.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from pretrain.models.decoder import Decoder
from pretrain.models.parameters import declared_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step, the same on every rank.

    Attributes:
        gradient_norm: global norm before clipping, every parameter of the model counted once.
        applied: False where that norm is not finite: nothing was changed.
    """

    gradient_norm: float
    applied: bool


class Engine(ABC):
    """Owns gradients, optimizer and its state for one rank's part of the model."""

    def __init__(self, model: Decoder, optimizer: torch.optim.AdamW):
        self.decoder = model
        self.optimizer = optimizer
        self.parameters = dict(declared_parameters(model))
        # ZeRO-3 empties the parameters themselves.
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """What the schedule calls."""

    @abstractmethod
    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """Round the schedule of one optimizer step; when it ends, gradients are ready for :meth:`step`."""

    @abstractmethod
    def step(self, learning_rate: float) -> StepResult:
        """Clips and updates, unless the gradient is not finite; then forgets the gradients."""

    @abstractmethod
    def read_state(self, name: str, kind: str) -> Tensor | None:
        """This rank's slice of a parameter (``weight``) or of a moment; None where there is no moment yet.

        Collective over the data-parallel group, of an expert's parameter over the ranks that hold it: every rank of it
        must call in the same order.
        """

    @abstractmethod
    def read_gradient(self, name: str) -> Tensor | None:
        """This rank's slice of a parameter's complete gradient, before it is clipped; None where there is none.

        Between :meth:`accumulate` and :meth:`step`; collective as :meth:`read_state` is.
        """

    @abstractmethod
    def write_moments(self, moments: Iterator[tuple[str, dict[str, Tensor]]], steps: int) -> None:
        """Sets both moments of every parameter (this rank's slices) and AdamW's count of steps."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets that of the run; each parameter's own is a declared multiple of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["learning_rate_factor"]

    def sum_partial_gradients(self) -> None:
        """Sums gradients of which several ranks hold a part: over tensor-parallel ranks, and of what stages share."""
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            for parameter in self.parameters.values():
                if parameter.spec.partial_gradient and parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        self._sum_gradients_of_tied_embeddings()
        self._sum_gradients_of_shared_modules()

    def _sum_gradients_of_tied_embeddings(self) -> None:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        holds_a_copy = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
        if stages == 1 or not self.decoder.model.tie_embeddings or not holds_a_copy:
            return
        # Megatron-core's group of the first and the last stage.
        dist.all_reduce(self.parameters["embedding.weight"].grad, group=parallel_state.get_embedding_group())

    def _sum_gradients_of_shared_modules(self) -> None:
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return
        for parameter in self.parameters.values():
            if parameter.spec.on_every_stage:
                if parameter.grad is None:
                    # No layer of this stage uses it.
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=parallel_state.get_pipeline_model_parallel_group())


class ReplicatedEngine(Engine):
    """ZeRO 0: every data-parallel rank holds all of its model-parallel part and averages gradients."""

    def __init__(self, model: Decoder, optimizer: torch.optim.AdamW, gradient_clip: float):
        super().__init__(model, optimizer)
        self.gradient_clip = gradient_clip

    @property
    def model(self) -> nn.Module:
        return self.decoder

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        yield
        self.sum_partial_gradients()
        if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
            copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
            self._average(expert=False, group=copies)
            self._average(expert=True, group=parallel_state.get_expert_data_parallel_group())

    def _average(self, expert: bool, group: dist.ProcessGroup) -> None:
        """Sums gradients over the ranks that hold the parameters, and divides by the number of batches.

        An expert's gradient is of the tokens of its whole expert-parallel group already.
        """
        gradients = [
            parameter.grad
            for parameter in self.parameters.values()
            if parameter.grad is not None and parameter.spec.expert == expert
        ]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=group)
        flat /= parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _squared_norm(self, expert: bool) -> Tensor:
        """Of this rank's gradients of experts, or of all else, without copies that count elsewhere."""
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        counted = [
            parameter.grad
            for parameter in self.parameters.values()
            if parameter.grad is not None
            and parameter.spec.expert == expert
            and (parameter.spec.shard_dimension is not None or first)
            and not parameter.spec.pipeline_copy
        ]
        device = next(iter(self.parameters.values())).device
        if not counted:
            return torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack(torch._foreach_norm(counted)).double().square().sum()

    def _gradient_norm(self) -> float:
        total = self._squared_norm(expert=False)
        experts = self._squared_norm(expert=True)
        if parallel_state.get_expert_model_parallel_world_size() > 1:
            dist.all_reduce(experts, group=parallel_state.get_expert_model_parallel_group())
        total += experts
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        return math.sqrt(total.item()) if torch.isfinite(total) else math.inf

    def step(self, learning_rate: float) -> StepResult:
        norm = self._gradient_norm()
        if math.isfinite(norm):
            if 0 < self.gradient_clip < norm:
                gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
                torch._foreach_mul_(gradients, self.gradient_clip / norm)
            self.set_learning_rate(learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, math.isfinite(norm))

    def read_state(self, name: str, kind: str) -> Tensor | None:
        parameter = self.parameters[name]
        if kind == "weight":
            return parameter.detach()
        return self.optimizer.state.get(parameter, {}).get(kind)

    def read_gradient(self, name: str) -> Tensor | None:
        return self.parameters[name].grad

    def write_moments(self, moments: Iterator[tuple[str, dict[str, Tensor]]], steps: int) -> None:
        for name, values in moments:
            parameter = self.parameters[name]
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(steps)),
                **{kind: values[kind].to(parameter.device, copy=True) for kind in MOMENTS},
            }
