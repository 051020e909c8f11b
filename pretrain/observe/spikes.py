"""Notices that the loss jumps."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config.spikes import SpikesConfig

# Of a normal distribution, the standard deviation over the median absolute deviation.
_DEVIATION = 1.4826


@dataclass(frozen=True)
class Spike:
    """A loss that is too high.

    Attributes:
        loss: nats per token.
        median: of the steps before.
        limit: above which a loss is a spike.
    """

    loss: float
    median: float
    limit: float


class SpikeDetector:
    """Compares each step's loss with the median of those before it.

    Median and median absolute deviation (Hampel 1974, doi 10.2307/2285666) stand still while a few losses of the window
    are spikes, where mean and standard deviation would follow them. All losses enter the window, so that a loss which
    stays high is in the end the normal one.

    Args:
        losses: of the steps so far, those that an earlier process took to its checkpoint.
    """

    def __init__(self, config: SpikesConfig, losses: Sequence[float] = ()) -> None:
        self.config = config
        self.losses: deque[float] = deque(losses, maxlen=config.window)

    def take(self, loss: float) -> Spike | None:
        """Takes the loss of a step; says whether it is a spike. One that is not finite is none: its step is skipped."""
        if not math.isfinite(loss):
            return None
        found = None
        if 2 * len(self.losses) >= self.config.window:
            median = statistics.median(self.losses)
            deviation = _DEVIATION * statistics.median(abs(other - median) for other in self.losses)
            limit = median + max(self.config.threshold * deviation, self.config.least_increase)
            found = Spike(loss, median, limit) if loss > limit else None
        self.losses.append(loss)
        return found
