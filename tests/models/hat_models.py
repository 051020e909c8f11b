"""Small hierarchical autoregressive models for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.models.building import build_decoder
from pretrain.models.hierarchy.hat.model import HAT
from pretrain.models.parameters import initialise_weights
from pretrain.parallel.topology import build_topology, megatron_config
from tests.configurations import tiny_config
from tests.models.hnet_models import BLOCKS
from tests.parallel.programs import randomise

WORDS = {"tokenizer": {"type": "hierarchical_bytes"}}


def hat_model(read_words: str = "every", **fields: Any) -> dict[str, Any]:
    """A model section with every kind of state over bytes and over words; ``fields`` replace its keys."""
    hierarchy = {
        "type": "hat",
        "hidden_size": 32,
        "encoder": ["attention", "mamba2"],
        "decoder": ["mlstm", "mamba2"],
        "num_heads": 4,
        "read_words": read_words,
    }
    return {
        "vocab_size": 264,
        "hidden_size": 64,
        "num_layers": 2,
        "layers": ["mlstm", "attention"],
        "blocks": BLOCKS,
        "hierarchy": hierarchy,
        **fields,
    }


def hat_config(read_words: str = "every", **sections: dict[str, Any]) -> Config:
    """A configuration of such a model, for one process unless ``sections`` says otherwise."""
    return tiny_config(model=hat_model(read_words), **{"data": WORDS, **sections})


def random_hat(read_words: str = "every", **fields: Any) -> HAT:
    """Such a model in this process, every parameter away from its start."""
    config = tiny_config(model=hat_model(read_words, **fields), data=WORDS)
    build_topology(config)
    model = build_decoder(config.model, megatron_config(config))
    initialise_weights(model, 0)
    randomise(model)
    return model


def random_words(starts: Tensor, seed: int) -> Tensor:
    """Where words start, ``(batch, sequence)`` bool: at every document's first token, and here and there."""
    generator = torch.Generator().manual_seed(seed)
    return starts | (torch.rand(starts.shape, generator=generator) < 0.3)
