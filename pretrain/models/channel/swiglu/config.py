"""Configuration of the SwiGLU channel mixer."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from pretrain.models.mixer_config import MixerConfig


class SwiGLUConfig(MixerConfig):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202)."""

    type: Literal["swiglu"] = "swiglu"
    intermediate_size: int | None = Field(
        None, ge=1, description="inner width; null derives it from projection_factor and round_up_to"
    )
    projection_factor: float = Field(2.667, gt=0, description="inner width over hidden_size, before rounding")
    round_up_to: int = Field(64, ge=1, description="the inner width is rounded to a multiple of this")

    def inner_size(self, hidden_size: int) -> int:
        """Inner width.

        The published xLSTM models round by ``multiple * floor((factor * hidden + multiple - 1) / multiple)``
        in floating point, which is not a true ceiling (768 gives 2048, not 2112); their sizes depend on it.
        """
        if self.intermediate_size is not None:
            return self.intermediate_size
        multiple = self.round_up_to
        return multiple * math.floor((self.projection_factor * hidden_size + multiple - 1) / multiple)

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
        return [cls(round_up_to=8), cls(intermediate_size=2 * hidden_size)]


CONFIG = SwiGLUConfig
