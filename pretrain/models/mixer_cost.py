"""What a mixer costs, and a part of a hierarchy's outer stages, as their folders say. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MixerCost:
    """What a mixer costs, from its configuration alone.

    FLOPs count matrix products, a multiply-add as two, so that they can be compared with torch's
    ``FlopCounterMode``; what a scan does elementwise, which that counter cannot see, stands apart. Bytes are for
    one rank that holds the whole mixer; they split evenly over tensor-parallel ranks unless it is said otherwise.

    Attributes:
        parameters: number of trainable parameters, all tensor-parallel ranks together.
        parameters_replicated: how many of those every tensor-parallel rank holds in full.
        parameters_grouped: how many of those belong to groups that several heads share (keys of grouped queries):
            split over the ranks where their number divides ``parameter_groups``, else whole on each.
        parameter_groups: number of those groups.
        active_parameters: how many of those one token uses (fewer than ``parameters`` for routed experts).
        projection_flops_per_token: products of one token with weights, forward; the backward pass does twice
            as many.
        scan_flops_per_token: useful work along the sequence, forward, at the sequence length asked for:
            only pairs of tokens that may see each other count. The backward pass counts twice as much.
        executed_scan_flops_per_token: what the torch kernel really multiplies for that, forward, padding and
            masked pairs included.
        executed_scan_backward_flops_per_token: likewise backward, what the kernel computes again included.
        state_bytes: recurrent state of one sequence; for attention after ``sequence_length`` tokens.
        activation_bytes_per_token: kept for the backward pass per token when nothing is recomputed, on a GPU;
            the mixer's input is the block's to count.
        working_bytes_per_token: the most that this mixer's backward pass holds per token beyond what was kept for it,
            at a time when it may have freed some of that; gradients of weights and cast weights are left out.
        elementwise_scan_flops_per_token: useful elementwise work along the sequence, forward: cells of nonlinear
            recurrences, depthwise convolutions. One evaluation of each counts, not an iterative solver's
            repetitions. The backward pass counts twice as much.
        parameters_routed: how many of the parameters belong to routed experts, which expert-parallel ranks split.
        shared_parameters: parameters of modules that all such layers of a network share, by the modules' names; the
            network has them once, each pipeline stage a copy, and ``parameters`` leaves them out.
        activation_bytes_replicated: those of ``activation_bytes_per_token`` that every tensor-parallel rank keeps.
        activation_bytes_by_position: those that belong to positions: every tensor-parallel rank keeps them, unless
            sequence parallelism gives each its part of the sequence.
        working_bytes_replicated: those of ``working_bytes_per_token`` that every tensor-parallel rank holds.
        parameters_partial: those of ``parameters_replicated`` of whose gradients ranks have parts in any layout.
        parameters_at_once: of the product with weights that has most of them; 0: taken to be all of them.
    """

    parameters: int
    parameters_replicated: int
    active_parameters: int
    projection_flops_per_token: float
    scan_flops_per_token: float
    executed_scan_flops_per_token: float
    executed_scan_backward_flops_per_token: float
    state_bytes: int
    activation_bytes_per_token: float
    working_bytes_per_token: float
    elementwise_scan_flops_per_token: float = 0.0
    parameters_grouped: int = 0
    parameter_groups: int = 1
    parameters_routed: int = 0
    shared_parameters: Mapping[str, int] = field(default_factory=dict)
    activation_bytes_replicated: float = 0.0
    activation_bytes_by_position: float = 0.0
    working_bytes_replicated: float = 0.0
    parameters_partial: int = 0
    parameters_at_once: int = 0

    def parameters_per_rank(self, tensor: int, expert: int = 1) -> int:
        """Parameters on one of ``tensor`` tensor-parallel and ``expert`` expert-parallel ranks."""
        whole = self.parameters_replicated
        if self.parameter_groups % tensor:
            whole += self.parameters_grouped
        routed = self.routed_per_rank(tensor, expert)
        return (self.parameters - self.parameters_routed - whole) // tensor + whole + routed

    def routed_per_rank(self, tensor: int, expert: int) -> int:
        """Those of :meth:`parameters_per_rank` that belong to routed experts."""
        return self.parameters_routed // (tensor * expert)

    def at_once_per_rank(self, tensor: int, expert: int) -> float:
        """``parameters_at_once`` on one of ``tensor`` tensor-parallel and ``expert`` expert-parallel ranks."""
        share = self.parameters_at_once / self.parameters if self.parameters_at_once else 1.0
        return share * self.parameters_per_rank(tensor, expert)

    def activation_bytes_per_rank(self, tensor: int, sequence_parallel: bool) -> float:
        """``activation_bytes_per_token`` on one of ``tensor`` tensor-parallel ranks."""
        whole, positions = self.activation_bytes_replicated, self.activation_bytes_by_position
        positions_here = positions / (tensor if sequence_parallel else 1)
        return whole + positions_here + (self.activation_bytes_per_token - whole - positions) / tensor

    def working_bytes_per_rank(self, tensor: int) -> float:
        """``working_bytes_per_token`` on one of ``tensor`` tensor-parallel ranks."""
        whole = self.working_bytes_replicated
        return whole + (self.working_bytes_per_token - whole) / tensor

    @property
    def flops_per_token(self) -> float:
        """Useful FLOPs of one forward pass per token."""
        return self.projection_flops_per_token + self.scan_flops_per_token + self.elementwise_scan_flops_per_token


@dataclass(frozen=True)
class OuterCost:
    """What one block of a hierarchy's outer stages costs, or what joins a stage with that further in.

    Attributes:
        hidden_size: its width.
        positions_per_token: how many positions it is expected to have for each token that is read.
        block: the block's name in ``model.blocks``; None for a joint.
        place: of a block, the network that it belongs to, as :class:`OuterBlock` has it.
        joint: the cost of a joint, per position.
        norms: how many norms of this width a joint has; a block's are known.
    """

    hidden_size: int
    positions_per_token: float
    block: str | None = None
    place: str = ""
    joint: MixerCost | None = None
    norms: int = 0
