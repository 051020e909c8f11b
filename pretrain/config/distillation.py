"""The section of a run that learns from a teacher. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pretrain.config.model import ModelConfig
from pretrain.models.mixer_config import StrictModel


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
