"""Configuration of the mixture of experts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pretrain.models.mixer_config import AUXILIARY_LOSS, MixerConfig

# What the recurrent router carries from layer to layer.
ROUTER_STATE = "router_state"


class MoEConfig(MixerConfig):
    """A router chooses ``experts_per_token`` of ``num_experts`` SwiGLU networks for each token; no token is dropped.

    The router is linear (Shazeer et al. 2017, arXiv 1701.06538), or recurrent over layers (RMoE, Qiu et al. 2024, arXiv
    2408.06793): one GRU, shared by all layers, carries a state of each token from layer to layer.
    """

    type: Literal["moe"] = "moe"
    num_experts: int = Field(ge=2, description="routed experts of a layer")
    experts_per_token: int = Field(2, ge=1, description="experts that each token goes through")
    intermediate_size: int = Field(ge=1, description="inner width of each routed expert")
    shared_expert_size: int | None = Field(
        None, ge=1, description="inner width of an expert that every token goes through; null: there is none"
    )
    shared_expert_share: float = Field(
        0.5, gt=0, lt=1, description="weight of the shared expert's output; the routed ones' has the rest"
    )
    router: Literal["linear", "recurrent"] = Field("recurrent", description="recurrent: a GRU over layers")
    router_size: int = Field(256, ge=1, description="width of the recurrent router's state")
    balance_coefficient: float = Field(
        1e-3, ge=0, description="of the load-balancing loss, which each layer adds (arXiv 2101.03961)"
    )
    z_coefficient: float = Field(
        1e-3, ge=0, description="of the router's z loss, which each layer adds (arXiv 2202.08906)"
    )

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}; a token goes "
                f"through each expert once at most"
            )
        return self

    def problem(self, hidden_size: int, tensor_parallel: int) -> str | None:
        for name, size in (
            ("intermediate_size", self.intermediate_size),
            ("shared_expert_size", self.shared_expert_size),
        ):
            if size is not None and size % tensor_parallel:
                return f"{name}={size} is not divisible by parallel.tensor={tensor_parallel}; change either"
        return None

    def carried(self, hidden_size: int) -> dict[str, int]:
        channels = {ROUTER_STATE: self.router_size} if self.router == "recurrent" else {}
        if self.balance_coefficient or self.z_coefficient:
            channels[AUXILIARY_LOSS] = 1
        return channels

    def routed_experts(self) -> int:
        return self.num_experts

    @classmethod
    def examples(cls, hidden_size: int) -> list[MixerConfig]:
        return [
            cls(
                num_experts=4,
                experts_per_token=3,
                intermediate_size=hidden_size,
                router_size=12,
                balance_coefficient=0.3,
                z_coefficient=0.2,
            ),
            cls(
                num_experts=4,
                intermediate_size=24,
                shared_expert_size=hidden_size,
                shared_expert_share=0.3,
                router="linear",
                balance_coefficient=0.0,
                z_coefficient=0.3,
            ),
            cls(
                num_experts=3,
                experts_per_token=1,
                intermediate_size=16,
                router="linear",
                balance_coefficient=0.0,
                z_coefficient=0.0,
            ),
            cls(
                num_experts=2,
                intermediate_size=16,
                shared_expert_size=8,
                router_size=12,
                balance_coefficient=0.5,
                z_coefficient=0.0,
            ),
        ]


CONFIG = MoEConfig
