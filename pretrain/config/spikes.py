"""What a run does when its loss jumps. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pretrain.models.registry import StrictModel

if TYPE_CHECKING:
    from pretrain.config.schema import Config


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


def spikes_problem(config: Config) -> str | None:
    """Why ``train.spikes`` does not go with the rest, in one sentence; None where it does, or is not set."""
    train, spikes = config.train, config.train.spikes
    if spikes is None or spikes.action == "report":
        return None
    start = "train.spikes.action=rollback"
    if train.carry_state:
        return (
            f"{start} does not go with train.carry_state: rows would go on behind the samples that are left out with "
            f"the states of before them; use action=report, or leave out train.carry_state"
        )
    if train.checkpoint_every == 0:
        return f"{start} needs checkpoints to go back to; set train.checkpoint_every"
    reached = train.checkpoint_every * (train.keep_last - 1)
    if spikes.margin > reached:
        return (
            f"{start} with margin={spikes.margin} goes back further than the checkpoints that are surely kept, "
            f"train.checkpoint_every={train.checkpoint_every} x (train.keep_last={train.keep_last} - 1) = {reached} "
            f"steps; keep more, or lower train.spikes.margin"
        )
    return None
