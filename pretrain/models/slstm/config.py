"""Configuration of the sLSTM mixer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.models.mixer_config import MixerConfig


class SLSTMConfig(MixerConfig):
    """sLSTM with exponential input gate and recurrent weights within each head (xLSTM, arXiv 2405.04517)."""

    type: Literal["slstm"] = "slstm"
    num_heads: int = Field(ge=1, description="number of heads; hidden states feed back within each, not between them")
    convolution_width: int = Field(
        4, ge=0, description="tokens that the convolution before input and forget gate sees, this one included; 0: none"
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="epsilon of the per-head layer norm")

    def problem(self, hidden_size: int, tensor_parallel: int) -> str | None:
        if hidden_size % self.num_heads:
            return (
                f"num_heads={self.num_heads} does not divide hidden_size={hidden_size}; "
                f"choose either so that each head gets a whole number of channels"
            )
        if self.num_heads % tensor_parallel:
            return (
                f"num_heads={self.num_heads} is not divisible by parallel.tensor={tensor_parallel}; heads are "
                f"split over tensor-parallel ranks, so parallel.tensor must divide num_heads"
            )
        return None

    @classmethod
    def examples(cls, hidden_size: int) -> list[MixerConfig]:
        return [cls(num_heads=2), cls(num_heads=4, convolution_width=3), cls(num_heads=4, convolution_width=0)]


CONFIG = SLSTMConfig
