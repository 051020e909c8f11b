"""Small hierarchies for tests in which every network has experts: linear and recurrent routers, of several sizes."""

from __future__ import annotations

from typing import Any

from pretrain.models.building import build_decoder
from pretrain.models.decoder import Decoder
from pretrain.models.parameters import initialise_weights
from pretrain.parallel.topology import build_topology, megatron_config
from tests.configurations import tiny_config
from tests.models.hat_models import WORDS
from tests.models.hnet_models import BLOCKS as MIXERS
from tests.parallel.programs import randomise

# Losses so large that one of a part of the batch would be seen.
ROUTED = {"type": "moe", "num_experts": 4, "intermediate_size": 24, "router_size": 8}
ROUTED |= {"balance_coefficient": 0.3, "z_coefficient": 0.1}
BLOCKS: dict[str, Any] = {
    "recurrent": {**MIXERS["mamba2"], "channel": ROUTED},
    "routed": {"channel": ROUTED},
    "linear": {"channel": ROUTED | {"router": "linear", "experts_per_token": 1}},
    "dense": MIXERS["attention"],
    "inner": {**MIXERS["mlstm"], "channel": ROUTED | {"router_size": 12, "shared_expert_size": 16}},
}
# Two recurrent routers in each network: the state that the first one reads is zero.
OUTER = {
    "hidden_size": 32,
    "encoder": ["recurrent", "routed"],
    "decoder": ["recurrent", "linear", "routed"],
    "target_ratio": 3.0,
}
MIDDLE = {
    "hidden_size": 48,
    "encoder": ["routed", "recurrent"],
    "decoder": ["recurrent", "routed"],
    "target_ratio": 2.0,
}
HIERARCHIES: dict[str, dict[str, Any]] = {
    "hnet": {"type": "hnet", "stages": [OUTER, MIDDLE], "ratio_loss_weight": 0.5},
    "hat": {
        "type": "hat",
        "hidden_size": 32,
        "encoder": ["routed", "recurrent"],
        "decoder": ["recurrent", "linear", "routed"],
        "num_heads": 4,
    },
}


def expert_model(kind: str, **fields: Any) -> dict[str, Any]:
    """A model section; ``fields`` replace its keys."""
    return {
        "vocab_size": 264,
        "hidden_size": 64,
        "num_layers": 3,
        "layers": ["inner", "dense", "inner"],
        "blocks": BLOCKS,
        "hierarchy": HIERARCHIES[kind],
        **fields,
    }


def random_expert_model(kind: str, **fields: Any) -> Decoder:
    """Such a model in this process, every parameter away from its start."""
    config = tiny_config(model=expert_model(kind, **fields), data=WORDS if kind == "hat" else {})
    build_topology(config)
    model = build_decoder(config.model, megatron_config(config))
    initialise_weights(model, 0)
    randomise(model)
    return model
