"""mLSTM with pre-up-projection in Hugging Face's form: settings of ``modeling.py``; no native class has this layer."""

from __future__ import annotations

from pretrain.models.mlstm_pre_up.config import MLSTMPreUpConfig

KEYS: dict[str, dict] = {}
FIELDS: dict = {}


def settings(config: MLSTMPreUpConfig, hidden_size: int) -> dict[str, object]:
    return {
        "num_heads": config.num_heads,
        "inner_size": config.inner_size(hidden_size),
        "projection_block_size": config.projection_block_size,
        "convolution_width": config.convolution_width,
        "norm_epsilon": config.norm_epsilon,
        "cell_epsilon": config.cell_epsilon,
        "chunk_size": config.chunk_size,
    }
