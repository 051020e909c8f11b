"""Configuration of the Mamba-2 mixer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.models.mixer_config import MixerConfig


class Mamba2Config(MixerConfig):
    """State-space mixer with a scalar decay per head (Dao and Gu 2024, arXiv 2405.21060)."""

    exchanges_segments: ClassVar[bool] = True

    type: Literal["mamba2"] = "mamba2"
    head_size: int = Field(64, ge=1, description="channels of a head")
    num_heads: int | None = Field(None, ge=1, description="number of heads; null derives it from expand")
    expand: float = Field(2.0, gt=0, description="inner width over hidden_size, where num_heads is null")
    state_size: int = Field(128, ge=1, description="state of each channel (the paper's N)")
    num_groups: int = Field(1, ge=1, description="groups of heads that share keys and queries (the paper's B and C)")
    convolution_width: int = Field(4, ge=1, description="tokens that the causal convolution reads")
    convolution_bias: bool = Field(True, description="whether the convolution has a bias")
    gate_bias: float | None = Field(None, description="initial bias of every channel's gate; null: no such biases")
    norm_epsilon: float = Field(1e-5, gt=0, description="epsilon of the gated norm")
    decay_range: tuple[float, float] = Field((1.0, 16.0), description="initial decay rates are uniform in this range")
    step_size_range: tuple[float, float] = Field(
        (1e-3, 1e-1), description="initial step sizes are log-uniform in this range"
    )
    step_size_floor: float = Field(1e-4, gt=0, description="smallest initial step size")
    chunk_size: int = Field(64, ge=1, description="tokens per chunk of the chunkwise kernel")

    def heads(self, hidden_size: int) -> int:
        """Number of heads."""
        return int(hidden_size * self.expand) // self.head_size if self.num_heads is None else self.num_heads

    def inner_size(self, hidden_size: int) -> int:
        """Channels of all heads."""
        return self.heads(hidden_size) * self.head_size

    def shortest_segment(self) -> int:
        return self.convolution_width - 1

    def problem(self, hidden_size: int, tensor_parallel: int) -> str | None:
        heads = self.heads(hidden_size)
        if self.num_heads is None and heads * self.head_size != hidden_size * self.expand:
            return (
                f"head_size={self.head_size} does not divide hidden_size * expand = {hidden_size * self.expand:g}; "
                f"choose head_size or expand so that it does, or set num_heads"
            )
        if heads == 0 or heads % self.num_groups:
            return f"num_groups={self.num_groups} does not divide the {heads} heads; choose one that does"
        if heads % tensor_parallel:
            return (
                f"the {heads} heads are not divisible by parallel.tensor={tensor_parallel}; heads are split over "
                f"tensor-parallel ranks, so parallel.tensor must divide their number"
            )
        for name in ("decay_range", "step_size_range"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                return f"{name} must be two numbers above 0, the smaller one first, but is {low}, {high}"
        return None

    @classmethod
    def examples(cls, hidden_size: int) -> list[MixerConfig]:
        return [
            cls(head_size=8, state_size=6, num_groups=1, chunk_size=8),
            cls(head_size=4, state_size=5, num_groups=2, chunk_size=4, convolution_bias=False, convolution_width=3),
            cls(head_size=8, num_heads=6, state_size=4, num_groups=3, chunk_size=16, gate_bias=0.5),
        ]


CONFIG = Mamba2Config
