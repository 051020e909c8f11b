"""sLSTM in Hugging Face's form: settings of ``modeling.py``; no class of ``transformers`` has this layer."""

from __future__ import annotations

from pretrain.models.slstm.config import SLSTMConfig

KEYS: dict[str, dict] = {}
FIELDS: dict = {}


def settings(config: SLSTMConfig, hidden_size: int) -> dict[str, object]:
    return {
        "num_heads": config.num_heads,
        "convolution_width": config.convolution_width,
        "norm_epsilon": config.norm_epsilon,
    }
