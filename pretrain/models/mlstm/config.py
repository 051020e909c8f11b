"""Configuration of the mLSTM mixer (xLSTM-7B layout: post-up-projection, no convolution)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.models.mixer_config import MixerConfig


class MLSTMConfig(MixerConfig):
    """mLSTM with exponential input gate, per-head norm and output gate (xLSTM-7B, arXiv 2503.13427)."""

    exchanges_segments: ClassVar[bool] = True

    type: Literal["mlstm"] = "mlstm"
    num_heads: int = Field(ge=1, description="number of heads, each with its own matrix memory")
    query_key_factor: float = Field(0.5, gt=0, description="width of queries and keys over hidden_size")
    value_factor: float = Field(1.0, gt=0, description="width of values over hidden_size")
    gate_soft_cap: float = Field(15.0, gt=0, description="gates are capped to +-this by c*tanh(x/c)")
    norm_epsilon: float = Field(1e-6, gt=0, description="epsilon of the per-head layer norm")
    cell_epsilon: float = Field(1e-6, gt=0, description="epsilon added to the cell's denominator")
    input_gate_bias: float = Field(-10.0, description="initial bias of every input gate")
    forget_gate_bias: tuple[float, float] = Field(
        (3.0, 6.0), description="initial biases of the forget gates, spaced evenly from first to last head"
    )
    chunk_size: int = Field(64, ge=1, description="tokens per chunk of the chunkwise kernel")

    def query_key_size(self, hidden_size: int) -> int:
        """Width of the queries (and of the keys), all heads together."""
        return int(hidden_size * self.query_key_factor)

    def value_size(self, hidden_size: int) -> int:
        """Width of the values, all heads together."""
        return int(hidden_size * self.value_factor)

    def problem(self, hidden_size: int, tensor_parallel: int) -> str | None:
        for name, size in (
            ("query_key_factor", self.query_key_size(hidden_size)),
            ("value_factor", self.value_size(hidden_size)),
        ):
            if size == 0 or size % self.num_heads:
                return (
                    f"num_heads={self.num_heads} does not divide int(hidden_size * {name}) = {size}; "
                    f"choose num_heads or {name} so that each head gets a whole number of channels"
                )
        if self.num_heads % tensor_parallel:
            return (
                f"num_heads={self.num_heads} is not divisible by parallel.tensor={tensor_parallel}; heads are "
                f"split over tensor-parallel ranks, so parallel.tensor must divide num_heads"
            )
        return None

    @classmethod
    def examples(cls, hidden_size: int) -> list[MixerConfig]:
        return [
            cls(num_heads=2, chunk_size=8, input_gate_bias=-1.0),
            cls(num_heads=4, chunk_size=4, query_key_factor=1.0, value_factor=2.0, input_gate_bias=0.0),
        ]


CONFIG = MLSTMConfig
