"""Mixture of experts in Hugging Face's form: settings of ``modeling.py``; no native class has it."""

from __future__ import annotations

from pretrain.models.channel.moe.config import MoEConfig

KEYS: dict[str, dict[str, str]] = {}
FIELDS: dict[str, object] = {}


def settings(config: MoEConfig, hidden_size: int) -> dict[str, object]:
    return {
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "inner_size": config.intermediate_size,
        "shared_expert_size": config.shared_expert_size,
        "shared_expert_share": config.shared_expert_share,
        "router_size": config.router_size if config.router == "recurrent" else None,
    }
