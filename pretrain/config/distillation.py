"""The section of a run that learns from a teacher, and whether it goes with the rest. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pretrain.models.registry import StrictModel

if TYPE_CHECKING:
    from pretrain.config.schema import Config, ModelConfig


class LogitsTerm(StrictModel):
    """Kullback-Leibler divergence between the next tokens' probabilities (Hinton et al. 2015, arXiv 1503.02531)."""

    weight: float = Field(1.0, ge=0, description="factor of this term of the loss; 0: none")
    temperature: float = Field(
        1.0, gt=0, description="divides the logits of both; the divergence is multiplied by its square"
    )
    direction: Literal["forward", "reverse"] = Field(
        "forward",
        description="forward: of the student from the teacher, KL(teacher || student); reverse: the other way round",
    )


class LayerOutputsTerm(StrictModel):
    """Squared difference between the residual streams of both models behind each matched layer."""

    weight: float = Field(0.0, ge=0, description="factor of this term of the loss; 0: none")
    error: Literal["squared", "relative"] = Field(
        "relative",
        description="squared: mean square of the channels' differences; relative: over the teacher's mean square",
    )
    layers: Literal["replaced", "all"] | list[int] = Field(
        "replaced", description="replaced: those whose mixer is another than the teacher's; all; or a list, from 0"
    )


class LabelsTerm(StrictModel):
    """Cross-entropy of the data's own next tokens."""

    weight: float = Field(0.0, ge=0, description="factor of this term of the loss; 0: none")


class DistillationConfig(StrictModel):
    """Training with a teacher; each term is a mean over the labels that count of the global batch."""

    teacher: str = Field(min_length=1, description="run directory (its newest checkpoint) or one checkpoint")
    logits: LogitsTerm = LogitsTerm()
    layer_outputs: LayerOutputsTerm = LayerOutputsTerm()
    labels: LabelsTerm = LabelsTerm()
    train_only: Literal["everything", "replaced"] = Field(
        "everything",
        description="replaced: only mixers that are others than the teacher's, with the norms before them, learn",
    )

    @model_validator(mode="after")
    def _learns_from_the_teacher(self) -> DistillationConfig:
        if self.logits.weight == 0 and self.layer_outputs.weight == 0:
            raise ValueError(
                "logits.weight and layer_outputs.weight are both 0, so nothing is learned from the teacher; set one, "
                "or leave the section out"
            )
        return self


def replaced_layers(student: ModelConfig, teacher: ModelConfig) -> list[int]:
    """Layers whose sequence mixer is another than the teacher's."""
    shared = min(student.num_layers, teacher.num_layers)
    return [layer for layer in range(shared) if student.block(layer).mixer != teacher.block(layer).mixer]


def distillation_problem(config: Config) -> str | None:
    """Why a teacher does not go with the rest, in one sentence; None where it does, or there is none."""
    if config.distillation is None:
        return None
    model, parallel = config.model, config.parallel
    reasons = {
        "pipeline": "a stage would need the teacher's outputs of its own layers, and the last one its logits",
        "context": "the teacher would need the state before each segment from other ranks",
        "expert": "routed experts add losses of their own",
    }
    for key, reason in reasons.items():
        if getattr(parallel, key) > 1:
            return f"distillation does not go with parallel.{key}={getattr(parallel, key)}: {reason}; set it to 1"
    if model.hierarchy is not None:
        return (
            f"distillation does not go with model.hierarchy.type={model.hierarchy.type}, whose positions are not those "
            f"of the teacher; leave out one of them"
        )
    if model.carried_channels():
        names = ", ".join(model.carried_channels())
        return f"distillation does not go with layers that carry {names} to the next; leave out one of them"
    if config.train.carry_state:
        return (
            "distillation does not go with train.carry_state=true: the teacher's states are not kept from step to "
            "step; set it to false"
        )
    if config.train.loss_chunk_size is not None:
        return (
            "distillation does not go with train.loss_chunk_size: the teacher's logits are compared with the student's "
            "whole; set it to null"
        )
    layers = config.distillation.layer_outputs.layers
    if isinstance(layers, list):
        wrong = [layer for layer in layers if not 0 <= layer < model.num_layers]
        if wrong or not layers:
            shown = f"names layer {wrong[0]}" if wrong else "is empty"
            return (
                f"distillation.layer_outputs.layers {shown}, but layers are counted from 0 to {model.num_layers - 1}; "
                f"change it"
            )
    return None
