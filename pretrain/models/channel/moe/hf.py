"""Mixture of experts in Hugging Face's form: native names and fields by ``model_type``, settings of ``modeling.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.errors import InputError
from pretrain.models.channel.moe.config import MoEConfig
from pretrain.models.channel.swiglu import hf as swiglu
from pretrain.models.hugging_face import Piece


def _granite_names(config: MoEConfig) -> dict[str, str | Piece]:
    """Experts are stacked, each a gate above what it gates, and the class adds both kinds as they are."""
    experts, share = config.num_experts, config.shared_expert_share
    names: dict[str, str | Piece] = {"router.weight": "block_sparse_moe.router.layer.weight"}
    for index in range(experts):
        for place, part in enumerate(("gate", "up")):
            name = f"experts.{part}_weight_{index}"
            names[name] = Piece("block_sparse_moe.input_linear.weight", 2 * index + place, stack=experts)
        down = Piece("block_sparse_moe.output_linear.weight", index, stack=experts, scale=1 - share)
        names[f"experts.down_weight_{index}"] = down
    shared = {f"shared_expert.{name}": place for name, place in swiglu.KEYS["granitemoehybrid"].items()}
    return names | shared | {"shared_expert.down.weight": Piece("shared_mlp.output_linear.weight", scale=share)}


KEYS = {"granitemoehybrid": _granite_names}
OUTPUTS = ("experts.down_weight_*", "shared_expert.down.weight")


def _granite_fields(config: MoEConfig, hidden_size: int) -> dict[str, object]:
    if config.router != "linear":
        raise InputError("has no recurrent router")
    if config.shared_expert_size is None:
        raise InputError("has no experts without a shared one")
    if config.experts_per_token == 1:
        raise InputError("does not weigh the only expert of a token by its probability")
    return {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "intermediate_size": config.intermediate_size,
        "shared_intermediate_size": config.shared_expert_size,
    }


FIELDS = {"granitemoehybrid": _granite_fields}


def _granite_section(fields: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("num_local_experts", "num_experts_per_tok"):
        if not isinstance(fields[name], int) or fields[name] < 2:
            raise InputError(f"{name} is {fields[name]!r}, where with experts at least 2 can be imported")
    return {
        "type": "moe",
        "num_experts": fields["num_local_experts"],
        "experts_per_token": fields["num_experts_per_tok"],
        "intermediate_size": fields["intermediate_size"],
        "shared_expert_size": fields["shared_intermediate_size"],
        # Of any share, weights can be scaled; by a power of 2 they change in no digit.
        "shared_expert_share": 0.5,
        "router": "linear",
    }


SECTIONS = {"granitemoehybrid": _granite_section}


def settings(config: MoEConfig, hidden_size: int) -> dict[str, object]:
    return {
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "inner_size": config.intermediate_size,
        "shared_expert_size": config.shared_expert_size,
        "shared_expert_share": config.shared_expert_share,
        "router_size": config.router_size if config.router == "recurrent" else None,
    }
