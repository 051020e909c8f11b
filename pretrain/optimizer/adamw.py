"""AdamW over the declared parameters: those that decay, are bounded or learn at other rates apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pretrain.config.sections import OptimizerConfig
from pretrain.models.parameters import declared_parameters


class BoundedAdamW(torch.optim.AdamW):
    """AdamW that afterwards projects the parameters of groups with a ``bound`` back into [-bound, bound].

    Elementwise, and so the same over whole tensors and over ZeRO's flat partitions of a group.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = super().step(closure)
        for group in self.param_groups:
            if group["bound"] is not None and group["params"]:
                torch._foreach_clamp_min_(group["params"], -group["bound"])
                torch._foreach_clamp_max_(group["params"], group["bound"])
        return loss


def build_adamw(model: nn.Module, config: OptimizerConfig) -> BoundedAdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with one group per weight decay, bound and learning rate,
    experts apart; parameters that take no gradient are in none.

    Engines multiply the run's learning rate by each group's ``learning_rate_factor``. Weight decay is multiplied by
    the learning rate, and so by that factor too.

    The foreach form is one code path on every device and over ZeRO's flat partitions alike.
    """
    groups: dict[tuple[bool, float | None, float, bool], list[nn.Parameter]] = {}
    for _, parameter in declared_parameters(model):
        if not parameter.requires_grad:
            continue
        spec = parameter.spec
        key = (spec.weight_decay, spec.bound, spec.learning_rate_factor, spec.expert)
        groups.setdefault(key, []).append(parameter)
    return BoundedAdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "bound": bound,
                "learning_rate_factor": factor,
            }
            for (decays, bound, factor, _), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        foreach=True,
    )
