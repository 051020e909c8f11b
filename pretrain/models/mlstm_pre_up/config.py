"""Configuration of the mLSTM mixer of the first xLSTM (pre-up-projection)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.models.mixer_config import MixerConfig


class MLSTMPreUpConfig(MixerConfig):
    """mLSTM between an up and a down projection (xLSTM, arXiv 2405.04517); its block takes no channel mixer."""

    exchanges_segments: ClassVar[bool] = True

    type: Literal["mlstm_pre_up"] = "mlstm_pre_up"
    num_heads: int = Field(ge=1, description="number of heads, each with its own matrix memory")
    projection_factor: float = Field(2.0, gt=0, description="inner width over hidden_size")
    projection_block_size: int = Field(
        4, ge=1, description="channels of a block of the block-diagonal query, key and value projections"
    )
    convolution_width: int = Field(
        4, ge=2, description="tokens that the convolution before queries and keys sees, this one included"
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="epsilon of the per-head layer norm")
    cell_epsilon: float = Field(1e-6, gt=0, description="epsilon added to the cell's denominator")
    input_gate_bias_deviation: float = Field(
        0.1, ge=0, description="standard deviation of the initial biases of the input gates, around 0"
    )
    forget_gate_bias: tuple[float, float] = Field(
        (3.0, 6.0), description="initial biases of the forget gates, spaced evenly from first to last head"
    )
    chunk_size: int = Field(64, ge=1, description="tokens per chunk of the chunkwise kernel")

    def inner_size(self, hidden_size: int) -> int:
        """Width of the cell: of its queries, keys and values, all heads together."""
        return int(hidden_size * self.projection_factor)

    def shortest_segment(self) -> int:
        return self.convolution_width - 1

    def problem(self, hidden_size: int, tensor_parallel: int) -> str | None:
        inner = self.inner_size(hidden_size)
        for name, parts in (("num_heads", self.num_heads), ("projection_block_size", self.projection_block_size)):
            if inner == 0 or inner % parts:
                return (
                    f"{name}={parts} does not divide int(hidden_size * projection_factor) = {inner}; "
                    f"choose {name} or projection_factor so that it does"
                )
        if self.num_heads % tensor_parallel:
            return (
                f"num_heads={self.num_heads} is not divisible by parallel.tensor={tensor_parallel}; heads are "
                f"split over tensor-parallel ranks, so parallel.tensor must divide num_heads"
            )
        blocks = inner // self.projection_block_size
        if blocks % tensor_parallel:
            return (
                f"the {blocks} blocks of projection_block_size={self.projection_block_size} channels do not split "
                f"over parallel.tensor={tensor_parallel}; choose a smaller projection_block_size"
            )
        return None

    @classmethod
    def examples(cls, hidden_size: int) -> list[MixerConfig]:
        return [
            cls(num_heads=2, chunk_size=8),
            cls(num_heads=4, chunk_size=4, projection_factor=1.0, projection_block_size=2, convolution_width=3),
        ]


CONFIG = MLSTMPreUpConfig
