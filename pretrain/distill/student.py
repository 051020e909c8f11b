"""A decoder that learns from a teacher: its loss has terms of the teacher's logits and of the outputs of its layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pretrain.config.distillation import DistillationConfig, replaced_layers
from pretrain.config.model import ModelConfig
from pretrain.config.schema import Config
from pretrain.distill.divergence import divergence
from pretrain.distill.teacher import Lesson, Teacher, open_teacher
from pretrain.errors import InputError
from pretrain.models.carried import with_auxiliary_loss
from pretrain.models.decoder import IGNORED_LABEL, Decoder
from pretrain.models.mixer import Documents
from pretrain.parallel.agreement import on_every_rank
from pretrain.parallel.topology import megatron_config

# Names that the run logs.
DIVERGENCE = "distillation/divergence"
LAYER_OUTPUTS = "distillation/layer_outputs"
LOSS = "distillation/loss"


def output_errors(student: Tensor, teacher: Tensor, relative: bool) -> Tensor:
    """Mean square of the difference of two ``(..., channels)`` tensors, float32 ``(...)``.

    ``relative``: over the teacher's own mean square.
    """
    teacher = teacher.float()
    error = (student.float() - teacher).square().mean(-1)
    return error / teacher.square().mean(-1).clamp(min=1e-12) if relative else error


class Student(Decoder):
    """A whole decoder with a teacher beside it; evaluation and decoding know nothing of the teacher."""

    def __init__(self, model: ModelConfig, megatron: TransformerConfig, settings: DistillationConfig, teacher: Teacher):
        super().__init__(model, megatron)
        self.settings = settings
        # Not a module of this one.
        object.__setattr__(self, "teacher", teacher)
        self.replaced = replaced_layers(model, teacher.model)
        chosen = settings.layer_outputs.layers
        everything = list(range(model.num_layers))
        by_name = {"replaced": self.replaced, "all": everything}
        layers = by_name[chosen] if isinstance(chosen, str) else sorted(set(chosen))
        self.matched = [str(layer) for layer in layers] if settings.layer_outputs.weight > 0 else []
        self._sums: dict[str, Tensor] = {}

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Student:
        # Wherever this model is moved, its teacher goes too.
        self.teacher.decoder._apply(change, recurse)
        return super()._apply(change, recurse)

    def forward(
        self, tokens: Tensor, labels: Tensor, document_starts: Tensor, word_starts: Tensor | None = None
    ) -> Tensor:
        """As :meth:`Decoder.forward`: the summed cross-entropy of the labels that count.

        Where gradients are wanted, that of the result is the gradient of the weighted sum of the terms instead, summed
        over the same labels.
        """
        if not torch.is_grad_enabled():
            return super().forward(tokens, labels, document_starts, word_starts)
        documents = Documents(document_starts)
        lesson = self.teacher.teach(tokens, documents, self.matched)
        logits, outputs = self.logits_and_outputs(tokens, documents, self.matched)
        return self._loss(logits, outputs, lesson, labels)

    def _loss(self, logits: Tensor, outputs: dict[str, Tensor], lesson: Lesson, labels: Tensor) -> Tensor:
        counts = (labels != IGNORED_LABEL).t()
        settings, trained = self.settings, logits.new_zeros(())
        if settings.logits.weight > 0:
            # Before cross-entropy, which works in place.
            by_position = divergence(
                logits, lesson.logits, settings.logits.temperature, settings.logits.direction == "reverse"
            )
            total = (by_position * counts).sum()
            self._add(DIVERGENCE, total)
            trained = trained + settings.logits.weight * total
        if self.matched:
            own, relative = self._own_positions(counts), settings.layer_outputs.error == "relative"
            errors = [output_errors(outputs[layer], lesson.outputs[layer], relative) * own for layer in self.matched]
            total = torch.stack(errors).mean(0).sum()
            self._add(LAYER_OUTPUTS, total)
            trained = trained + settings.layer_outputs.weight * total
        nats = vocab_parallel_cross_entropy(logits, labels.where(counts.t(), 0).t().contiguous())
        cross_entropy = (nats * counts).sum()
        self._add(LOSS, cross_entropy)
        if settings.labels.weight > 0:
            trained = trained + settings.labels.weight * cross_entropy
        return with_auxiliary_loss(cross_entropy.detach(), trained)

    def _own_positions(self, counts: Tensor) -> Tensor:
        """Of ``(sequence, batch)`` flags those of this rank's part of the sequence."""
        if not self.config.sequence_parallel:
            return counts
        ranks = self.config.tensor_model_parallel_size
        return counts.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]

    def _add(self, name: str, total: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + total.detach().double()

    def take_loss_terms(self, labels: int) -> dict[str, float]:
        """The terms of the last step, each a mean over its labels, unweighted; and their weighted sum."""
        settings = self.settings
        weights = {DIVERGENCE: settings.logits.weight, LAYER_OUTPUTS: settings.layer_outputs.weight}
        weights = {name: weight for name, weight in weights.items() if weight > 0} | {LOSS: settings.labels.weight}
        device = next(self.parameters()).device
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        totals = torch.stack([self._sums.get(name, nothing) for name in weights])
        self._sums = {}
        names = list(weights)
        if self.config.sequence_parallel and LAYER_OUTPUTS in weights:
            # Each rank knows the positions of its part of the sequence.
            part = totals[names.index(LAYER_OUTPUTS)].clone()
            dist.all_reduce(part, group=parallel_state.get_tensor_model_parallel_group())
            totals[names.index(LAYER_OUTPUTS)] = part
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        means = dict(zip(names, (totals / max(labels, 1)).tolist(), strict=True))
        return means | {LOSS: sum(weights[name] * mean for name, mean in means.items())}


def build_student(config: Config) -> Student:
    """This rank's part of the model of ``config``, not yet filled, and its teacher, which is; groups must exist.

    Raises:
        InputError: on every rank, where the teacher cannot be read, or does not go with the model.
    """
    opened: list[Teacher] = []
    on_every_rank(lambda: opened.append(open_teacher(config)))
    settings = config.distillation
    student = Student(config.model, megatron_config(config), settings, opened[0])
    compares = settings.train_only == "replaced" or (
        settings.layer_outputs.weight > 0 and settings.layer_outputs.layers == "replaced"
    )
    if compares and not student.replaced:
        raise InputError(
            f"distillation.teacher={settings.teacher}: has the student's mixers in every layer, so that none is "
            f"replaced, as distillation.train_only or distillation.layer_outputs.layers asks for; change model.layers "
            f"or those keys"
        )
    if settings.train_only == "replaced":
        trained = tuple(f"layers.{layer}.{part}" for layer in student.replaced for part in ("mixer.", "mixer_norm."))
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
    return student
