"""Configuration of the ParaGRU mixer."""

from __future__ import annotations

from typing import Literal

from pretrain.models.mixer_config import MixerConfig
from pretrain.models.newton_config import NewtonBlockConfig


class ParaGRUConfig(NewtonBlockConfig):
    """GRU with elementwise recurrence (ParaRNN, arXiv 2510.21450), between a convolution and a gated norm."""

    type: Literal["para_gru"] = "para_gru"

    @classmethod
    def examples(cls, hidden_size: int) -> list[MixerConfig]:
        return [
            cls(num_heads=2),
            cls(num_heads=4, expansion=1.5, recurrent_bound=0.9, norm_groups=4, memory_bias=(-1.0, 2.0)),
            cls(num_heads=2, expansion=0.5, convolution_width=3, newton_iterations=5),
        ]


CONFIG = ParaGRUConfig
