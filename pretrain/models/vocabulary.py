"""Logits of this rank's part of the vocabulary, and the cross-entropy of labels by chunks of positions.

Float32 logits are the largest tensors of a step where the vocabulary is large: 6 GiB for 32,768 positions of 50,304
tokens, and with a soft cap three such tensors stand at once. By chunks, no more than one chunk of them is held at a
time: forward keeps the logarithm of each position's sum, from which backward makes the softmax again. The head's
product is done twice for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True)
class Vocabulary:
    """The part of the vocabulary that this rank makes logits of.

    Attributes:
        rows: of the head's weight on this rank, padding included.
        real: of those rows, the ones that are tokens.
        first: token of the first row.
        soft_cap: logits are ``cap * tanh(logits / cap)``; None: as they are.
    """

    rows: int
    real: int
    first: int
    soft_cap: float | None

    @classmethod
    def of_this_rank(cls, size: int, rows: int, soft_cap: float | None) -> Vocabulary:
        """The part of ``size`` tokens, each tensor-parallel rank holding ``rows``."""
        first = parallel_state.get_tensor_model_parallel_rank() * rows
        return cls(rows, min(max(size - first, 0), rows), first, soft_cap)

    def logits(self, product: Tensor) -> Tensor:
        """Float32 logits of the head's product ``(..., rows)``: capped, and padding never likely."""
        logits, cap = product.float(), self.soft_cap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        if self.real == self.rows:
            return logits
        return logits.masked_fill(self._padding(logits.device), float("-inf"))

    def gradient(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """That of the product, given the logits and theirs, which it may overwrite; zero at padding already."""
        if self.soft_cap is None:
            return gradient
        slope = 1 - (logits / self.soft_cap).square()
        if self.real < self.rows:
            slope = slope.masked_fill(self._padding(logits.device), 0.0)
        return gradient.mul_(slope)

    def own(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each label, 0 where another rank holds it; and whether this one does."""
        rows = labels - self.first
        here = (rows >= 0) & (rows < self.rows)
        return rows.where(here, 0), here

    def _padding(self, device: torch.device) -> Tensor:
        return torch.arange(self.rows, device=device) >= self.real


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Of ``hidden @ weight.T``; each rank returns the whole, and its own part of both gradients."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor, vocabulary: Vocabulary, chunk_size: int
    ) -> Tensor:
        cast = weight.to(hidden.dtype)
        totals = hidden.new_empty(len(hidden), dtype=torch.float32)
        chosen = torch.empty_like(totals)
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = vocabulary.logits(hidden[chunk] @ cast.t())
            rows, here = vocabulary.own(labels[chunk])
            totals[chunk] = torch.logsumexp(logits, -1)
            chosen[chunk] = logits.gather(1, rows.unsqueeze(1)).squeeze(1).where(here, 0.0)
            del logits
        totals, chosen = _over_ranks(totals, chosen)
        ctx.save_for_backward(hidden, weight, labels, totals)
        ctx.vocabulary, ctx.chunk_size = vocabulary, chunk_size
        return totals - chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, totals = ctx.saved_tensors
        vocabulary: Vocabulary = ctx.vocabulary
        cast = weight.to(hidden.dtype)
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            logits = vocabulary.logits(hidden[chunk] @ cast.t())
            rows, here = vocabulary.own(labels[chunk])
            logarithms = totals[chunk].unsqueeze(1)
            # Without a cap nothing asks for the logits again.
            softmax = (logits.sub_(logarithms) if vocabulary.soft_cap is None else logits - logarithms).exp_()
            softmax.scatter_add_(1, rows.unsqueeze(1), -here.unsqueeze(1).to(softmax.dtype))
            softmax.mul_(gradient[chunk].unsqueeze(1))
            of_product = vocabulary.gradient(logits, softmax).to(hidden.dtype)
            del logits, softmax
            if for_hidden is not None:
                for_hidden[chunk] = of_product @ cast
            if for_weight is not None:
                # Chunks are summed in the dtype of the weight, which is float32.
                if weight.dtype == hidden.dtype:
                    for_weight.addmm_(of_product.t(), hidden[chunk])
                else:
                    for_weight += of_product.t() @ hidden[chunk]
            del of_product
        return for_hidden, for_weight, None, None, None


def _over_ranks(totals: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the sums over all ranks' parts of the vocabulary, and the logits of the labels."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return totals, chosen
    group = parallel_state.get_tensor_model_parallel_group()
    greatest = totals.clone()
    dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([torch.exp(totals - greatest), chosen])
    dist.all_reduce(sums, group=group)
    return greatest + torch.log(sums[0]), sums[1]


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocabulary: Vocabulary, chunk_size: int, sequence_parallel: bool
) -> Tensor:
    """Cross-entropy of labels, no more than ``chunk_size`` positions' logits at a time.

    Args:
        hidden: ``(sequence, batch, hidden_size)`` in the dtype of the products; under sequence parallelism this
            tensor-parallel rank's part of the sequence.
        weight: ``(rows, hidden_size)``, this rank's part of the head's.
        labels: ``(sequence, batch)`` int64 of the whole sequence, each a token of the vocabulary.

    Returns:
        Nats, ``(sequence, batch)`` float32, the same on every tensor-parallel rank.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    nats = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), weight, labels.flatten(), vocabulary, chunk_size)
    return nats.view_as(labels)
