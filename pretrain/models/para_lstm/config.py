"""Configuration of the ParaLSTM mixer."""

from __future__ import annotations

from typing import Literal

from pretrain.models.mixer_config import MixerConfig
from pretrain.models.newton_config import NewtonBlockConfig


class ParaLSTMConfig(NewtonBlockConfig):
    """LSTM with elementwise recurrence and peepholes, input gate coupled to the forget gate (ParaRNN, 2510.21450)."""

    type: Literal["para_lstm"] = "para_lstm"

    @classmethod
    def examples(cls, hidden_size: int) -> list[MixerConfig]:
        return [
            cls(num_heads=2),
            cls(num_heads=4, expansion=2.0, recurrent_bound=0.3, norm_groups=4, memory_bias=(1.0, 3.0)),
            cls(num_heads=2, expansion=0.5, convolution_width=2, newton_iterations=5),
        ]


CONFIG = ParaLSTMConfig
