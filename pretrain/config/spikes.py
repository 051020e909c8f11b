"""What a run does when its loss jumps. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.models.mixer_config import StrictModel


class SpikesConfig(StrictModel):
    """A step is a spike where its loss is so far above the median of the steps before it."""

    action: Literal["report", "rollback"] = Field(
        "report",
        description="rollback: go back to a checkpoint from before the spike, and leave out the samples of the spike "
        "and of the steps right before it (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1)",
    )
    window: int = Field(128, ge=8, description="steps that a loss is compared with; from half as many on it is")
    threshold: float = Field(
        6.0, gt=0, description="standard deviations above the median, estimated by the median absolute deviation"
    )
    least_increase: float = Field(0.2, ge=0, description="nats per token above the median that are needed besides")
    margin: int = Field(
        4, ge=0, description="steps right before a spike that are taken for a part of it, and whose samples go too"
    )
    max_rollbacks: int = Field(10, ge=1, description="of the whole run; further spikes are only reported")
