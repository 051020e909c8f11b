"""Configuration of H-Net. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from pretrain.models.mixer_config import HierarchyConfig, OuterBlock, StrictModel


class HNetStageConfig(StrictModel):
    """An encoder and a decoder round whatever stands further in; between the encoder and that, chunks are formed."""

    hidden_size: int = Field(ge=1, description="width of this stage; not above that of the next one in")
    encoder: list[str] = Field(min_length=1, description="names of the encoder's blocks in model.blocks, in order")
    decoder: list[str] = Field(min_length=1, description="names of the decoder's blocks in model.blocks, in order")
    target_ratio: float = Field(
        gt=1, description="positions per chunk that the ratio loss draws towards; a plan reckons with it"
    )
    learning_rate_factor: float = Field(
        1.0, gt=0, description="learning rate of this stage over optimizer.learning_rate"
    )


class HNetConfig(HierarchyConfig):
    """Dynamic chunking in one or more stages (Hwang et al. 2025, arXiv 2507.07955).

    ``model.layers`` are the innermost network.
    """

    type: Literal["hnet"] = "hnet"
    stages: list[HNetStageConfig] = Field(min_length=1, description="from the outermost, which reads bytes, inwards")
    ratio_loss_weight: float = Field(0.03, ge=0, description="weight of each stage's ratio loss beside cross-entropy")
    inner_learning_rate_factor: float = Field(
        1.0, gt=0, description="learning rate of the innermost network over optimizer.learning_rate"
    )

    @model_validator(mode="after")
    def _widths_grow_inwards(self) -> HNetConfig:
        widths = [stage.hidden_size for stage in self.stages]
        if widths != sorted(widths):
            raise ValueError(f"the widths of stages, from the outermost inwards, must not shrink, but are {widths}")
        return self

    @property
    def embedding_size(self) -> int:
        return self.stages[0].hidden_size

    @property
    def inner_positions_per_token(self) -> float:
        return 1.0 / math.prod(stage.target_ratio for stage in self.stages)

    def measured(self, metrics: Mapping[str, float]) -> HNetConfig:
        sizes = [1.0] + [metrics[f"bytes_per_chunk_{index}"] for index in range(len(self.stages))]
        ratios = [size / before for before, size in zip(sizes, sizes[1:], strict=False)]
        stages = [
            stage.model_copy(update={"target_ratio": ratio}) for stage, ratio in zip(self.stages, ratios, strict=True)
        ]
        return self.model_copy(update={"stages": stages})

    def outer_blocks(self) -> list[OuterBlock]:
        return [
            OuterBlock(f"hierarchy.stages.{index}.{part}", name, stage.hidden_size)
            for index, stage in enumerate(self.stages)
            for part in ("encoder", "decoder")
            for name in getattr(stage, part)
        ]

    def problem(self, hidden_size: int) -> str | None:
        if self.stages[-1].hidden_size > hidden_size:
            return (
                f"stages.{len(self.stages) - 1}.hidden_size={self.stages[-1].hidden_size} is above "
                f"model.hidden_size={hidden_size}, the innermost width; widths must not shrink inwards"
            )
        return None

    def layout_problem(self, pipeline: int, sequence_parallel: bool) -> str | None:
        if pipeline > 1:
            return (
                f"type hnet does not go with parallel.pipeline={pipeline}: how many chunks a micro-batch has is known "
                f"only once its encoder has run, while pipeline stages exchange tensors of one fixed length; use "
                f"parallel.pipeline=1 with tensor parallelism and ZeRO"
            )
        if sequence_parallel:
            return (
                "type hnet does not go with parallel.sequence=true: boundaries depend on neighbouring bytes, and "
                "chunks do not divide evenly over ranks; use parallel.sequence=false"
            )
        return None

    def metric_reductions(self) -> dict[str, str]:
        """For each stage, counted from 0 at the outermost:

        * ``bytes_per_chunk_N``: bytes (tokens of the tokenizer, boundary marks included) over chunks of the stage;
        * ``boundary_fraction_N``: F, the share of positions that begin a chunk;
        * ``boundary_probability_N``: G, the mean probability of that;
        * ``ratio_loss_N``: the loss made of both, 1 where both are one over the target.

        All are over the whole global batch.
        """
        reductions = {}
        for index in range(len(self.stages)):
            reductions |= {
                f"bytes_per_chunk_{index}": "max",
                f"boundary_fraction_{index}": "max",
                f"boundary_probability_{index}": "sum",
                f"ratio_loss_{index}": "sum",
            }
        return reductions


CONFIG = HNetConfig
