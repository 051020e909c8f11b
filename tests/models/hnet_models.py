"""Small H-Nets for tests."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.config import Config
from pretrain.models.building import build_decoder
from pretrain.models.hierarchy.hnet.model import HNet
from pretrain.models.parameters import initialise_weights
from pretrain.parallel.topology import build_topology, megatron_config
from tests.configurations import tiny_config
from tests.parallel.programs import randomise

BLOCKS: dict[str, Any] = {
    "mamba2": {"mixer": {"type": "mamba2", "head_size": 16, "state_size": 8, "chunk_size": 8}},
    # Input gates as models are trained: with larger ones the cell multiplies rounding, which also moves boundaries.
    "mlstm": {"mixer": {"type": "mlstm", "num_heads": 4, "chunk_size": 8, "input_gate_bias": -10.0}},
    "attention": {
        "mixer": {"type": "attention", "num_heads": 4, "sliding_window": 6},
        "channel": {"type": "swiglu", "round_up_to": 8},
    },
}

OUTER = {"hidden_size": 32, "encoder": ["mamba2"], "decoder": ["mlstm", "mamba2"], "target_ratio": 3.0}
MIDDLE = {"hidden_size": 48, "encoder": ["attention", "mamba2"], "decoder": ["mlstm"], "target_ratio": 2.0}


def hnet_model(stages: int, **fields: Any) -> dict[str, Any]:
    """A model section of one or two stages, with every kind of state in each."""
    hierarchy = {"type": "hnet", "stages": [OUTER, MIDDLE][:stages], "ratio_loss_weight": 0.5}
    return {
        "vocab_size": 264,
        "hidden_size": 64,
        "num_layers": 2,
        "layers": ["mlstm", "attention"],
        "blocks": BLOCKS,
        "hierarchy": hierarchy,
        **fields,
    }


def hnet_config(stages: int, **sections: dict[str, Any]) -> Config:
    """A configuration of such a model, for one process unless ``sections`` says otherwise."""
    return tiny_config(model=hnet_model(stages), **sections)


def random_hnet(stages: int, **sections: dict[str, Any]) -> HNet:
    """Such a model in this process, every parameter away from its start."""
    config = hnet_config(stages, **sections)
    build_topology(config)
    model = build_decoder(config.model, megatron_config(config))
    initialise_weights(model, 0)
    randomise(model)
    return model


def random_bytes(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """``(rows, length)`` int64 in which bytes repeat, so that there are positions unlike and like the one before."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 6, (rows, length), generator=generator) * 40
