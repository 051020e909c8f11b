"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from pretrain.config.schema import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of an optimizer step, counted from 0.

    Warm-up rises linearly to the peak, which its last step reaches. ``cosine`` and ``linear`` decay over
    ``decay_steps`` (all that follows warm-up, unless it is given) and stay at ``final_fraction`` of the peak;
    ``wsd`` (warm-up, stable, decay) holds the peak and decays linearly over the last ``decay_steps``.
    """
    schedule, steps = config.schedule, config.train.steps
    peak, warmup = config.optimizer.learning_rate, config.schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.type == "constant":
        return peak
    if schedule.type == "wsd":
        length = schedule.decay_steps or max(1, steps // 5)
        length = min(length, max(1, steps - warmup))
        begin = steps - length
    else:
        length = schedule.decay_steps or max(1, steps - warmup)
        begin = warmup
    progress = min(max((step - begin) / length, 0.0), 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.type == "cosine" else 1 - progress
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * remaining)
