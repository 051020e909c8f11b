"""A small model of each configuration, trained from scratch on one task, and tested at that length and beyond.

The decoder, AdamW and the schedule are those of real runs; batches come from a generator instead of stored documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pretrain.config import Config
from pretrain.errors import InputError, TrainingError
from pretrain.evaluate.recall.base import Example, RecallTask, as_batch
from pretrain.models.building import build_decoder
from pretrain.models.decoder import Decoder
from pretrain.models.loading import for_one_process
from pretrain.models.parameters import initialise_weights
from pretrain.optimizer.adamw import build_adamw
from pretrain.optimizer.learning_rate import learning_rate
from pretrain.parallel.topology import build_topology, megatron_config

_TOLD_EVERY = 100


@dataclass(frozen=True)
class Accuracy:
    """Answers that were right.

    Attributes:
        share: of all answers.
        answers: how many there were.
        cases: share by case, where the task has any.
    """

    share: float
    answers: int
    cases: dict[str, float]


def config_for(task: RecallTask, config: Config, steps: int, origin: str) -> Config:
    """The run of ``config`` on this task: its model with the task's vocabulary, its optimizer and schedule.

    Warm-up takes the same share of the steps as in the configuration's own run.

    Raises:
        InputError: the model reads chunks or words, or states go on from step to step.
    """
    if config.model.hierarchy is not None:
        raise InputError(
            f"{origin}: model.hierarchy.type={config.model.hierarchy.type} forms chunks or words of text, and recall "
            f"tasks are no text; leave out model.hierarchy"
        )
    if config.train.carry_state:
        raise InputError(f"{origin}: recall tasks begin anew in every row; set train.carry_state to false")
    single = for_one_process(config, origin, config.train.device)
    warmup = min(round(config.schedule.warmup_steps * steps / config.train.steps), steps - 1)
    return single.model_copy(
        update={
            "model": single.model.model_copy(update={"vocab_size": -(-task.vocabulary_size // 8) * 8}),
            "train": single.train.model_copy(update={"steps": steps}),
            "schedule": single.schedule.model_copy(update={"warmup_steps": warmup, "decay_steps": None}),
        }
    )


def train_on(task: RecallTask, config: Config, length: int, say: Callable[[str], object]) -> Decoder:
    """A model of ``config`` (see :func:`config_for`) trained on the training split, in evaluation mode.

    Builds the process groups of one process and drops those of another layout.

    Raises:
        TrainingError: the loss or the gradient is not finite.
    """
    topology = build_topology(config)
    model = build_decoder(config.model, megatron_config(config))
    initialise_weights(model, config.train.seed)
    model.to(topology.device).train()
    optimizer = build_adamw(model, config.optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    clip = config.optimizer.gradient_clip or float("inf")
    rows = config.train.global_batch_size
    for step in range(config.train.steps):
        indices = range(step * rows, (step + 1) * rows)
        batch = as_batch(task.examples("train", length, indices, config.train.seed)).to(topology.device)
        loss = model(*model.inputs(batch)) / batch.label_count
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"{task.name}: the gradient of step {step + 1} is not finite; lower optimizer.learning_rate"
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step) * group["learning_rate_factor"]
        optimizer.step()
        if (step + 1) % _TOLD_EVERY == 0:
            say(f"step {step + 1} of {config.train.steps}, loss {loss.item():.4f}")
    return model.eval()


@torch.no_grad()
def accuracy_of(model: Decoder, task: RecallTask, length: int, samples: int, rows: int, seed: int = 0) -> Accuracy:
    """The model on the first ``samples`` examples of the test split, ``rows`` at a time."""
    device = next(model.parameters()).device
    right: list[np.ndarray] = []
    cases: list[np.ndarray] = []
    for first in range(0, samples, rows):
        examples = task.examples("test", length, range(first, min(first + rows, samples)), seed)
        batch = as_batch(examples).to(device)
        logits, _ = model.logits(batch.tokens, document_starts=batch.document_starts)
        predicted = logits[..., : task.vocabulary_size].argmax(dim=-1).cpu().numpy()
        for example, row in zip(examples, predicted, strict=True):
            answers = right_answers(task, example, row)
            right.append(answers)
            cases.append(np.full(len(answers), example.case))
    together, of_case = np.concatenate(right), np.concatenate(cases)
    shares = {str(case): float(together[of_case == case].mean()) for case in sorted(set(of_case.tolist()) - {""})}
    return Accuracy(float(together.mean()), len(together), shares)


def right_answers(task: RecallTask, example: Example, predicted: np.ndarray) -> np.ndarray:
    """(answers,) bool: which answers of an example ``predicted`` (S,) int64 gives."""
    numbers = task.answers(example.labels)
    asked = numbers >= 0
    wrong = np.bincount(numbers[asked], weights=predicted[asked] != example.labels[asked])
    return wrong == 0
