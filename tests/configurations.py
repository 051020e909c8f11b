"""Small configurations for tests."""

from __future__ import annotations

from typing import Any

from pretrain.config import Config, parse_config
from pretrain.models.registry import channel_mixers, sequence_mixers

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


def every_mixer_model(hidden_size: int, repetitions: int = 2, **fields: Any) -> dict[str, Any]:
    """A model section with a block of each registered mixer, and blocks that hold one part alone.

    The pattern stands ``repetitions`` times in it: twice, so that it divides into two pipeline stages.
    """
    channels = [family.config.examples(hidden_size)[0].model_dump() for family in channel_mixers().values()]
    mixers = [family.config.examples(hidden_size)[0].model_dump() for family in sequence_mixers().values()]
    blocks: dict[str, dict[str, Any]] = {
        f"both_{index}": {"mixer": mixer, "channel": channels[index % len(channels)]}
        for index, mixer in enumerate(mixers)
    }
    blocks |= {"mixer_alone": {"mixer": mixers[0]}, "channel_alone": {"channel": channels[-1]}}
    return {
        "hidden_size": hidden_size,
        "num_layers": repetitions * len(blocks),
        "layers": list(blocks),
        "blocks": blocks,
        **fields,
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
        "train": {"steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "device": "cpu"},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return parse_config(raw, "test")
