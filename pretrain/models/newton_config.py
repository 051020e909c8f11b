"""What ParaGRU and ParaLSTM have in common that needs no torch: their settings and what they cost.

Both are one block (:mod:`pretrain.models.newton_block`) around two cells.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from pretrain.models.mixer_config import MixerConfig
from pretrain.models.mixer_cost import MixerCost
from pretrain.models.segment_messages import SegmentMessage, window_before
from pretrain.models.tensor_messages import TensorMessage, split_projections, summed_inside

_FLOAT32 = 4


class NewtonBlockConfig(MixerConfig):
    """Settings of a block around an elementwise nonlinear recurrence (ParaRNN, arXiv 2510.21450)."""

    exchanges_segments: ClassVar[bool] = True

    num_heads: int = Field(ge=1, description="blocks of the block-diagonal map from convolution to gates")
    expansion: float = Field(1.0, gt=0, description="channels of the recurrence over hidden_size")
    convolution_width: int = Field(4, ge=2, description="tokens that the causal convolution before the cell sees")
    recurrent_bound: float = Field(
        0.5, gt=0, description="recurrent weights are kept within +-this; beyond 0.5 Newton needs more iterations"
    )
    memory_bias: tuple[float, float] = Field(
        (0.0, 1.0), description="initial log-odds of keeping the old state, spaced evenly from first to last channel"
    )
    newton_iterations: int = Field(3, ge=1, description="Newton iterations before the residual is first looked at")
    newton_max_iterations: int = Field(
        8, ge=1, description="iterations after which what is above newton_tolerance is solved token by token"
    )
    newton_tolerance: float | None = Field(
        None,
        gt=0,
        description="largest residual allowed, relative to the larger of 1 and the largest state; null: rounding",
    )
    norm_groups: int = Field(1, ge=1, description="groups of channels normalised apart: 1 as published, or num_heads")
    norm_epsilon: float = Field(1e-5, gt=0, description="epsilon of the norm after the cell")

    def inner_size(self, hidden_size: int) -> int:
        """Channels of the recurrence."""
        return int(hidden_size * self.expansion)

    def shortest_segment(self) -> int:
        return self.convolution_width - 1

    def problem(self, hidden_size: int, tensor_parallel: int) -> str | None:
        inner = self.inner_size(hidden_size)
        if inner == 0 or inner % self.num_heads:
            return (
                f"num_heads={self.num_heads} does not divide int(hidden_size * expansion) = {inner}; "
                f"choose num_heads or expansion so that each head gets a whole number of channels"
            )
        if inner % self.norm_groups:
            return f"norm_groups={self.norm_groups} does not divide int(hidden_size * expansion) = {inner}"
        if self.num_heads % tensor_parallel:
            return (
                f"num_heads={self.num_heads} is not divisible by parallel.tensor={tensor_parallel}; heads are "
                f"split over tensor-parallel ranks, so parallel.tensor must divide num_heads"
            )
        if self.newton_max_iterations < self.newton_iterations:
            return (
                f"newton_max_iterations={self.newton_max_iterations} is below "
                f"newton_iterations={self.newton_iterations}, which every solve does"
            )
        return None


def block_cost(
    config: NewtonBlockConfig,
    hidden_size: int,
    bytes_per_element: int,
    *,
    state_size: int,
    peepholes: int,
    cell_flops: int,
) -> MixerCost:
    """Costs of the block around a cell.

    Useful elementwise work is **one** evaluation of the recurrence and of the convolution for each token and
    channel: what a loop over tokens would do. Newton's iterations, the Jacobians and the scan multiply that, but
    they are the price of running in parallel, not work that the model asks for.

    Args:
        config: of the mixer.
        hidden_size: width of the residual stream.
        bytes_per_element: of activations.
        state_size: numbers of recurrent state per channel.
        peepholes: vectors of recurrent weights beside the three of the gates.
        cell_flops: of one step per channel; a sigmoid or tanh counts as one.
    """
    inner, width = config.inner_size(hidden_size), config.convolution_width
    weights = 3 * hidden_size * inner + 3 * inner * (inner // config.num_heads)
    # Weights and bias of the convolution, of the recurrence, and the norm's weight.
    vectors = inner * ((width + 1) + (3 + 3 + peepholes) + 1)
    cast_copy = 0 if bytes_per_element == _FLOAT32 else _FLOAT32
    activations = inner * (
        # Both halves of the input projection, the convolution's output, the gates, and what the output projection
        # reads.
        bytes_per_element * (2 + 1 + 3 + 1)
        # The states that the cell's gradient is taken at.
        + _FLOAT32 * state_size
        # The cell's output for the norm, and the output gate, in float32 where they are not.
        + 2 * cast_copy
        # Normalised, normalised and scaled, and SiLU of the output gate.
        + 3 * _FLOAT32
    )
    return MixerCost(
        parameters=weights + vectors,
        parameters_replicated=0,
        active_parameters=weights + vectors,
        projection_flops_per_token=2.0 * weights,
        scan_flops_per_token=0.0,
        executed_scan_flops_per_token=0.0,
        executed_scan_backward_flops_per_token=0.0,
        # A multiply-add for each token that the convolution sees, its bias, and a SiLU as two.
        elementwise_scan_flops_per_token=float(inner * (cell_flops + 2 * width + 3)),
        state_bytes=_FLOAT32 * inner * (state_size + width - 1),
        activation_bytes_per_token=float(activations),
        # While the output gate's gradient is made: that, of what it scales, and of the product. The cell's adjoint
        # states come after what stands behind the cell is freed, and take less.
        working_bytes_per_token=float(inner * (2 * _FLOAT32 + (bytes_per_element if cast_copy else 0))),
        parameters_at_once=2 * hidden_size * inner,
    )


def block_messages(config: NewtonBlockConfig, hidden_size: int, *, state_size: int) -> list[SegmentMessage]:
    """What ranks that hold segments of a sequence say of it.

    The convolution's last inputs; a first guess of the last state; then, for each Newton step and the last look at
    the residual, what the segment does to a correction, its residual and its largest state; backward what it does to
    a gradient. Where more steps are needed than ``newton_iterations`` it is more.
    """
    inner = config.inner_size(hidden_size)
    state, affine = _FLOAT32 * inner * state_size, _FLOAT32 * inner * (state_size**2 + state_size)
    return [
        window_before(inner, config.convolution_width),
        SegmentMessage("next", state, 0),
        SegmentMessage("everyone", affine + 2 * _FLOAT32, 0, times=config.newton_iterations + 1),
        SegmentMessage("everyone", 0, affine),
    ]


def block_tensor_messages(
    config: NewtonBlockConfig, hidden_size: int, bytes_per_element: int, tensor: int, sequence: bool
) -> list[TensorMessage]:
    """Those of the projections, and squares that groups of the norm have on several ranks."""
    inside = summed_inside(config.norm_groups) if config.norm_groups % tensor else []
    return inside + split_projections(config, hidden_size, bytes_per_element, tensor, sequence)
