"""Configuration of the MLP channel mixer."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

from pydantic import Field

from pretrain.models.mixer_config import MixerConfig


class MLPConfig(MixerConfig):
    """``down(activation(up(x)))``, or gated, ``down(activation(gate(x)) * up(x))``.

    Nemotron-H has the former with squared ReLU (So et al. 2021, arXiv 2109.08668), blocks of sLSTM the latter with GELU
    (Shazeer 2020, arXiv 2002.05202).
    """

    type: Literal["mlp"] = "mlp"
    activation: Literal["relu_squared", "gelu", "silu"] = Field(
        "relu_squared", description="activation; gelu is the exact one, not its tanh approximation"
    )
    gated: bool = Field(False, description="multiply by a second projection of the input")
    intermediate_size: int | None = Field(
        None, ge=1, description="inner width; null derives it from projection_factor and round_up_to"
    )
    projection_factor: float = Field(4.0, gt=0, description="inner width over hidden_size, before rounding")
    round_up_to: int = Field(64, ge=1, description="the inner width is rounded up to a multiple of this")

    def inner_size(self, hidden_size: int) -> int:
        """Inner width: the next multiple of ``round_up_to`` at or above ``projection_factor * hidden_size``.

        Reckoned with the factor as it is written: in floating point 1.1 * 640 is more than 704.
        """
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = Fraction(str(self.projection_factor)) * hidden_size
        return self.round_up_to * math.ceil(width / self.round_up_to)

    def problem(self, hidden_size: int, tensor_parallel: int) -> str | None:
        inner = self.inner_size(hidden_size)
        if inner % tensor_parallel:
            return (
                f"the inner width {inner} is not divisible by parallel.tensor={tensor_parallel}; set "
                f"intermediate_size or round_up_to so that it is"
            )
        return None

    @classmethod
    def examples(cls, hidden_size: int) -> list[MixerConfig]:
        return [
            cls(round_up_to=16),
            cls(activation="gelu", gated=True, projection_factor=1.3, round_up_to=8),
            cls(activation="silu", intermediate_size=2 * hidden_size),
            cls(gated=True, intermediate_size=hidden_size),
        ]


CONFIG = MLPConfig
