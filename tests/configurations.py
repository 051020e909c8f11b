"""Small configurations for tests."""

from __future__ import annotations

from typing import Any

from pretrain.config import Config, parse_config

TINY_MODEL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "num_layers": 4,
    "layers": ["mlstm"],
    "blocks": {
        "mlstm": {"mixer": {"type": "mlstm", "num_heads": 4, "chunk_size": 8}, "channel": {"type": "swiglu"}},
    },
    "output_logit_soft_cap": 30.0,
}


def tiny_config(directory: str = "unused", **sections: dict[str, Any]) -> Config:
    """A configuration that trains in milliseconds; ``sections`` add to or replace its keys."""
    raw: dict[str, dict[str, Any]] = {
        "run": {"directory": directory},
        "model": TINY_MODEL,
        "data": {
            "source": {"type": "standard_library"},
            "tokenizer": {"type": "bytes"},
            "sequence_length": 16,
        },
        "parallel": {"zero": 0},
        # A first Adam step is the sign of each gradient; a larger epsilon keeps rounding of gradients that are
        # nearly zero from flipping it, so that layouts can be compared closely.
        "optimizer": {"learning_rate": 3e-3, "epsilon": 1e-5, "gradient_clip": 0.3},
        "train": {"steps": 5, "global_batch_size": 16, "micro_batch_size": 2, "device": "cpu"},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return parse_config(raw, "test")
