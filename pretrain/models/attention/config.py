"""Configuration of the attention mixer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.models.mixer_config import MixerConfig, StrictModel

# Pairs of query and key beyond which a mask costs more than compiling once does.
MOST_MASKED_PAIRS = 1024 * 1024


class RotaryScaling(StrictModel):
    """Longer rotary wavelengths for texts longer than a model was first trained on, as in Llama 3.1.

    With ``n`` wavelengths in the original context, those of ``n <= low_frequency_factor`` are ``factor`` times as long,
    those of ``n >= high_frequency_factor`` stay, and the frequencies in between are interpolated linearly in ``n``.
    """

    factor: float = Field(ge=1, description="how many times as long the longest wavelengths become")
    low_frequency_factor: float = Field(1.0, gt=0, description="wavelengths per context up to which all of it counts")
    high_frequency_factor: float = Field(4.0, gt=0, description="wavelengths per context from which on none does")
    original_context: int = Field(8192, ge=1, description="tokens of a text that the model was first trained on")

    @model_validator(mode="after")
    def _low_is_below_high(self) -> RotaryScaling:
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor={self.low_frequency_factor} must be below "
                f"high_frequency_factor={self.high_frequency_factor}"
            )
        return self


class AttentionConfig(MixerConfig):
    """Causal softmax attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245)."""

    exchanges_segments: ClassVar[bool] = True

    type: Literal["attention"] = "attention"
    num_heads: int = Field(ge=1, description="number of query heads")
    num_key_value_heads: int | None = Field(
        None,
        ge=1,
        description="number of key and value heads, each shared by equally many query heads; null: num_heads",
    )
    head_size: int | None = Field(None, ge=1, description="channels per head; null: hidden_size / num_heads")
    rotary_fraction: float = Field(
        1.0, ge=0, le=1, description="part of each head's channels with rotary positions; 0: no positions at all"
    )
    rotary_base: float = Field(10000.0, gt=1, description="base of the rotary wavelengths")
    rotary_scaling: RotaryScaling | None = Field(None, description="of the rotary wavelengths; null: as they are")
    sliding_window: int | None = Field(
        None, ge=1, description="a token sees so many tokens, itself included; null: its whole document so far"
    )
    softmax_scale: float | None = Field(None, gt=0, description="factor of the scores; null: head_size ** -0.5")
    query_key_norm: bool = Field(False, description="RMS norm with a weight over each head's query and key")
    norm_epsilon: float = Field(1e-6, gt=0, description="epsilon of that norm")
    bias: bool = Field(False, description="biases of queries, keys and values")
    output_bias: bool | None = Field(None, description="bias of the output projection; null: as bias")

    @property
    def key_value_heads(self) -> int:
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def has_output_bias(self) -> bool:
        return self.bias if self.output_bias is None else self.output_bias

    def size_of_head(self, hidden_size: int) -> int:
        """Channels per head."""
        return hidden_size // self.num_heads if self.head_size is None else self.head_size

    def rotary_size(self, hidden_size: int) -> int:
        """Channels per head that carry rotary positions; they are a head's first."""
        return int(self.size_of_head(hidden_size) * self.rotary_fraction)

    def problem(self, hidden_size: int, tensor_parallel: int) -> str | None:
        if self.head_size is None and hidden_size % self.num_heads:
            return (
                f"num_heads={self.num_heads} does not divide hidden_size={hidden_size}; change either or set head_size"
            )
        if self.num_heads % self.key_value_heads:
            return (
                f"num_key_value_heads={self.key_value_heads} does not divide num_heads={self.num_heads}; each key head "
                f"must be shared by equally many query heads"
            )
        rotary = self.rotary_size(hidden_size)
        if rotary % 2 or (rotary == 0 and self.rotary_fraction > 0):
            return (
                f"rotary_fraction={self.rotary_fraction} gives {rotary} of {self.size_of_head(hidden_size)} channels "
                f"per head, but channels are rotated in pairs; change it or head_size"
            )
        if self.rotary_scaling is not None and rotary == 0:
            return "rotary_scaling is set, but rotary_fraction=0 leaves no rotary positions; change either"
        if self.num_heads % tensor_parallel:
            return (
                f"num_heads={self.num_heads} is not divisible by parallel.tensor={tensor_parallel}; heads are "
                f"split over tensor-parallel ranks, so parallel.tensor must divide num_heads"
            )
        return None

    @classmethod
    def examples(cls, hidden_size: int) -> list[MixerConfig]:
        return [
            cls(num_heads=4, num_key_value_heads=2),
            # Two ranks share one key head here; below, the middle one of three.
            cls(
                num_heads=4,
                num_key_value_heads=1,
                head_size=8,
                rotary_fraction=0.5,
                rotary_base=100.0,
                sliding_window=5,
                query_key_norm=True,
                bias=True,
            ),
            cls(num_heads=6, num_key_value_heads=3, head_size=5, rotary_fraction=0.0, softmax_scale=0.7),
            cls(num_heads=2, sliding_window=8),
            cls(num_heads=4, num_key_value_heads=2, bias=True, output_bias=False),
            cls(
                num_heads=2,
                head_size=6,
                query_key_norm=True,
                rotary_base=50.0,
                rotary_scaling=RotaryScaling(factor=4.0, original_context=32),
            ),
        ]


CONFIG = AttentionConfig
