"""ParaGRU in Hugging Face's form: settings of ``modeling.py``; no class of ``transformers`` has this layer."""

from __future__ import annotations

from pretrain.models.newton_config import NewtonBlockConfig

KEYS: dict[str, dict] = {}
FIELDS: dict = {}


def settings(config: NewtonBlockConfig, hidden_size: int) -> dict[str, object]:
    return {
        "inner_size": config.inner_size(hidden_size),
        "num_heads": config.num_heads,
        "convolution_width": config.convolution_width,
        "norm_groups": config.norm_groups,
        "norm_epsilon": config.norm_epsilon,
    }
