"""What a run measures beyond its loss, and where it is sent. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from pretrain.models.mixer_config import StrictModel


class SamplesConfig(StrictModel):
    """Texts that the model writes while it is trained, in RUN/samples.jsonl."""

    every: int = Field(1000, ge=1, description="steps between two times; also at the end")
    prompts: list[str] = Field([""], min_length=1, description="beginnings of documents, which may be empty")
    max_new_tokens: int = Field(64, ge=1, description="most tokens that are added to a prompt")
    temperature: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="logits are divided by it; 0: always the likeliest token"
    )
    top_k: int = Field(0, ge=0, description="draw only from that many likeliest tokens; 0: from all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw only from the likeliest tokens that together reach this probability"
    )


class ObserveConfig(StrictModel):
    """Figures that cost time, taken every so many steps; without this section none of them is."""

    every: int = Field(100, ge=1, description="steps between two that are looked at")
    per_block: bool = Field(
        True, description="gradient norm and update over weight norm of each block; copies this rank's part of weights"
    )
    states: bool = Field(True, description="gates of each recurrent layer, and norms of its state behind each row")
    peak_tflops: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="TFLOP/s that one device can do at most in the run's precision, for the model FLOPs utilization; "
        "null: those of known GPUs in bfloat16, or none is logged",
    )
    samples: SamplesConfig | None = Field(
        None, description="what the model writes after so many steps, in whatever layout it is trained; null: nothing"
    )


class TensorBoardConfig(StrictModel):
    """TensorBoard, its files in RUN/tensorboard."""

    flush_seconds: int = Field(30, ge=1, description="longest time that figures stay in memory")
