"""The loss that draws each stage's chunks towards a target size, over the whole global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pretrain.models.carried import with_auxiliary_loss
from pretrain.models.hierarchy.hnet.routing import Boundaries


def ratio_loss(fraction: Tensor, probability: Tensor, target: float) -> Tensor:
    """``N / (N - 1) ((N - 1) F G + (1 - F) (1 - G))`` (Hwang et al. 2025, arXiv 2507.07955, equation 10).

    It is 1, its least for F = G, where both are ``1 / N``.

    Args:
        fraction: F, the share of positions that begin a chunk.
        probability: G, the mean probability of that.
        target: N, positions per chunk.
    """
    return target / (target - 1) * ((target - 1) * fraction * probability + (1 - fraction) * (1 - probability))


class RatioLoss:
    """The ratio losses of all stages, over a global batch that comes in micro-batches and on several ranks.

    F and G are means over *all* positions of the global batch, so the loss is not a sum over micro-batches. But F has
    no gradient, and in G the loss is linear::

        dL/dG = N / (N - 1) (N F - 1)        dG/dp_t = 1 / T        T: positions of the stage in the global batch

    With F and T known before the first backward pass, each micro-batch so adds its exact share of the gradient, and
    the sum is the same however the batch is cut. Where a rank has one micro-batch, a sum over data-parallel ranks
    behind its forward pass gives both. Where it has more, encoders and routers run over all of them once before,
    without gradients: :meth:`begin_batch` takes what they counted.

    Metrics are over the global batch as well.
    """

    def __init__(self, targets: Sequence[float], weight: float):
        self.targets, self.weight = list(targets), weight
        self._labels: float | None = None
        self._counts: Tensor | None = None
        self._recorded: dict[int, Boundaries] = {}
        self._figures: tuple[Tensor, list[Tensor]] | None = None

    def begin_batch(self, labels: float, counts: Tensor | None) -> None:
        """Before the micro-batches of a global batch.

        Args:
            labels: how many of its labels count.
            counts: ``(stages + 1,)`` float64, this rank's positions of each stage and chunks of the last, over all of
                its micro-batches; None: the next forward pass is its only one, and counts them.
        """
        self._labels = labels
        self._counts = None if counts is None else self._over_ranks(counts)
        self._figures = None

    def begin_micro_batch(self) -> None:
        """Before a forward pass."""
        self._recorded = {}

    def record(self, stage: int, boundaries: Boundaries) -> None:
        """Takes the boundaries of a stage in the present forward pass."""
        self._recorded[stage] = boundaries

    def added_to(self, loss: Tensor, labels: Tensor) -> Tensor:
        """``loss`` with the gradient of the ratio losses added, and its own value.

        Args:
            loss: summed over the labels of a micro-batch. Whoever divides it by the labels of the global batch divides
                by them what is added too, which therefore is multiplied by them.
            labels: how many labels of this micro-batch count; only looked at where no batch was begun, and this one
                stands for all of it.
        """
        recorded = [self._recorded[stage] for stage in range(len(self.targets))]
        counts = self._counts
        if counts is None:
            chosen = [boundaries.chosen.sum(dtype=torch.float64) for boundaries in recorded]
            positions = chosen[0].new_tensor(recorded[0].chosen.numel())
            counts = self._over_ranks(torch.stack([positions, *chosen]))
        sums = [boundaries.probability.sum() for boundaries in recorded]
        scale = labels if self._labels is None else self._labels
        added = loss.new_zeros(())
        for stage, target in enumerate(self.targets):
            fraction = counts[stage + 1] / counts[stage]
            slope = target / (target - 1) * (target * fraction - 1)
            added = added + (self.weight * scale * slope / counts[stage]).to(loss.dtype) * sums[stage]
        # Or the graph of this forward pass would live until the next.
        self._recorded = {}
        self._keep_figures(counts, [value.detach().double() for value in sums])
        return with_auxiliary_loss(loss, added)

    def take_metrics(self) -> dict[str, float]:
        """This rank's share of the figures of the last global batch; empty before the first one."""
        if self._figures is None:
            return {}
        counts, sums = self._figures
        self._figures = None
        ranks = dist.get_world_size()
        same = ranks / parallel_state.get_data_parallel_world_size()
        found = {}
        for stage, target in enumerate(self.targets):
            fraction = counts[stage + 1] / counts[stage]
            probability = sums[stage] / counts[stage] / same
            # Linear in G, so that ranks' shares of it add up.
            constant = ratio_loss(fraction, torch.zeros_like(fraction), target) / ranks
            slope = target / (target - 1) * (target * fraction - 1)
            found[f"bytes_per_chunk_{stage}"] = (counts[0] / counts[stage + 1]).item()
            found[f"boundary_fraction_{stage}"] = fraction.item()
            found[f"boundary_probability_{stage}"] = probability.item()
            found[f"ratio_loss_{stage}"] = (constant + slope * probability).item()
        return found

    def _keep_figures(self, counts: Tensor, sums: list[Tensor]) -> None:
        if self._figures is not None and self._counts is not None:
            sums = [before + now for before, now in zip(self._figures[1], sums, strict=True)]
        self._figures = (counts, sums)

    @staticmethod
    def _over_ranks(counts: Tensor) -> Tensor:
        if parallel_state.get_data_parallel_world_size() > 1:
            counts = counts.clone()
            dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        return counts
