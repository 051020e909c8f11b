"""AdamW over the declared parameters, decayed and undecayed apart."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.config.schema import OptimizerConfig
from pretrain.models.parameters import declared_parameters


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with one group per weight decay.

    The foreach form is one code path on every device and over ZeRO's flat partitions alike.
    """
    decayed, undecayed = [], []
    for _, parameter in declared_parameters(model):
        (decayed if parameter.spec.weight_decay else undecayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        foreach=True,
    )
