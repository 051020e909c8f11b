"""What a run measures beyond its loss, and where it is sent. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from pretrain.models.registry import StrictModel


class ObserveConfig(StrictModel):
    """Figures that cost time, taken every so many steps; without this section none of them is."""

    every: int = Field(100, ge=1, description="steps between two that are looked at")
    per_block: bool = Field(
        True, description="gradient norm and update over weight norm of each block; copies this rank's part of weights"
    )
    states: bool = Field(True, description="gates of each recurrent layer, and norms of its state behind each row")


class TensorBoardConfig(StrictModel):
    """TensorBoard, its files in RUN/tensorboard."""

    flush_seconds: int = Field(30, ge=1, description="longest time that figures stay in memory")
