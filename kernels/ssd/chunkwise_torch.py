"""The state-space recurrence chunk by chunk, on batched matrix products, with a backward pass written by hand.

Within a chunk every pair of tokens meets in a product of scores, which the heads of a group share, and of decays; from
chunk to chunk the state carries what came before. All exponents are sums of decays and so never positive. The backward
pass computes scores, decays and states again rather than keeping them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class _Chunks:
    """One call, cut into chunks of ``L`` tokens; the batch and the chunks together are ``R`` rows.

    Groups ``G`` of ``M`` heads share keys and queries. Padding behind the last token has a step size of zero: it
    neither decays nor adds anything.
    """

    values: Tensor  # (R, G, L, M, P)
    keys: Tensor  # (R, G, L, N)
    queries: Tensor  # (R, G, L, N)
    steps: Tensor  # (R, G, L, M)
    total: Tensor  # (R, G, L, M): log decay from the chunk's beginning to each token
    related: Tensor  # (R, L, L) bool: token i sees token j
    reached: Tensor | None  # (R, L) bool: the state before the chunk reaches token i; None: always
    lasting: Tensor | None  # (R, L) bool: token j belongs to the chunk's last document; None: always
    batch: int

    def reach(self) -> Tensor:
        """(R, G, L, M): how much of the state before the chunk is left at each token."""
        decay = self.total.exp()
        return decay if self.reached is None else decay * self.reached[:, None, :, None]

    def survival(self) -> Tensor:
        """(R, G, L, M): how much of each token's contribution is left at the chunk's end."""
        decay = (self.total[:, :, -1:] - self.total).exp_()
        return decay if self.lasting is None else decay.mul_(self.lasting[:, None, :, None])

    def stepped_by_head(self) -> Tensor:
        """(R, G, M, L, P): values times step sizes, contiguous, so that products over heads need no copies."""
        values, steps = self.values.transpose(2, 3), self.steps.transpose(2, 3)[..., None]
        return torch.mul(values, steps, out=values.new_empty(values.shape))

    def written(self, survival: Tensor) -> Tensor:
        """(R, G, L, M, P): what each token adds to the state behind the chunk, beside its key."""
        return self.values * (self.steps * survival)[..., None]

    def decays(self) -> Tensor:
        """(R, G, M, L, L): what is left of token j at token i; zero where i does not see j."""
        total = self.total.transpose(2, 3)
        differences = total[..., :, None] - total[..., None, :]
        return differences.masked_fill_(~self.related[:, None, None], -torch.inf).exp_()


def _cut(tensor: Tensor, chunk: int, groups: int | None) -> Tensor:
    """(batch, sequence, heads or groups, ...) to (rows, groups, chunk, ...), zeros behind; may share its memory."""
    batch, sequence = tensor.shape[:2]
    padding = -sequence % chunk
    if padding:
        tensor = torch.cat([tensor, tensor.new_zeros(batch, padding, *tensor.shape[2:])], dim=1)
    tensor = tensor.unflatten(1, (-1, chunk)).flatten(0, 1)
    if groups is not None:
        tensor = tensor.unflatten(2, (groups, -1))
    return tensor.transpose(1, 2).contiguous()


def _join(tensor: Tensor, batch: int, sequence: int) -> Tensor:
    """The inverse of ``_cut``: (rows, groups, chunk, ...) to (batch, sequence, groups, ...)."""
    return tensor.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)[:, :sequence]


def _prepare(
    values: Tensor,
    step_size: Tensor,
    decay_rate: Tensor,
    keys: Tensor,
    queries: Tensor,
    document_starts: Tensor | None,
    chunk: int,
    dtype: torch.dtype,
) -> _Chunks:
    groups, batch = keys.shape[2], values.shape[0]
    steps = _cut(step_size.to(dtype), chunk, groups)
    total = (steps * decay_rate.to(dtype).view(groups, 1, -1)).cumsum(2)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=values.device).tril_()
    reached = lasting = None
    related = causal.expand(steps.shape[0], chunk, chunk)
    if document_starts is not None and bool(document_starts.any()):
        starts = _cut(document_starts[..., None], chunk, None)[:, 0]
        # Counted within the chunk: 0 is the document that was there before it.
        document = starts.cumsum(1)
        related = causal & (document[:, :, None] == document[:, None, :])
        reached = document == 0
        lasting = document == document[:, -1:]
    return _Chunks(
        values=_cut(values.to(dtype), chunk, groups),
        keys=_cut(keys.to(dtype), chunk, None),
        queries=_cut(queries.to(dtype), chunk, None),
        steps=steps,
        total=total,
        related=related,
        reached=reached,
        lasting=lasting,
        batch=batch,
    )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product over the last two dimensions, the others together as one batch."""
    return torch.bmm(left.flatten(0, -3), right.flatten(0, -3)).unflatten(0, left.shape[:-2])


def _states(chunks: _Chunks, reach: Tensor, weighted: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, (batch, chunks, G, N, M, P), and after the last, (batch, G, N, M, P).

    ``weighted`` is :meth:`_Chunks.written`.
    """
    groups, heads = chunks.keys.shape[1], chunks.steps.shape[3]
    added = _product(chunks.keys.mT, weighted.flatten(-2)).unflatten(-1, (heads, -1))
    added = added.unflatten(0, (chunks.batch, -1))
    keep = _keep(chunks, reach)
    before, final = torch.empty_like(added), torch.empty_like(added[:, 0])
    before[:, 0] = initial_state.unflatten(1, (groups, heads)).permute(0, 1, 4, 2, 3)
    places = [*before.unbind(1), final]
    for step, (state, following) in enumerate(zip(places, places[1:], strict=False)):
        torch.addcmul(added[:, step], keep[:, step], state, out=following)
    return before, final


def _keep(chunks: _Chunks, reach: Tensor) -> Tensor:
    """(batch, chunks, G, 1, M, 1): how much of the state before each chunk is left at its end."""
    return reach[:, :, -1].unflatten(0, (chunks.batch, -1))[:, :, :, None, :, None]


def _by_rows(states: Tensor) -> Tensor:
    """(batch, chunks, G, N, M, P) to (R, G, N, M * P)."""
    return states.flatten(0, 1).flatten(-2)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        step_size: Tensor,
        decay_rate: Tensor,
        keys: Tensor,
        queries: Tensor,
        skip: Tensor | None,
        initial_state: Tensor,
        document_starts: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = initial_state.dtype
        chunks = _prepare(values, step_size, decay_rate, keys, queries, document_starts, chunk, dtype)
        reach = chunks.reach()
        before, final = _states(chunks, reach, chunks.written(chunks.survival()), initial_state)
        pairs = chunks.decays().mul_(_product(chunks.queries, chunks.keys.mT)[:, :, None])
        within = _product(pairs, chunks.stepped_by_head()).transpose(2, 3)
        carried = _product(chunks.queries, _by_rows(before)).view(chunks.values.shape)
        outputs = carried.mul_(reach[..., None]).add_(within)
        outputs = _join(outputs, values.shape[0], values.shape[1]).flatten(2, 3)
        if skip is not None:
            outputs = torch.addcmul(outputs, values.to(dtype), skip.to(dtype)[:, None])
        ctx.save_for_backward(values, step_size, decay_rate, keys, queries, skip, initial_state, document_starts)
        ctx.chunk = chunk
        return outputs.to(values.dtype), final.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor, final_gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, step_size, decay_rate, keys, queries, skip, initial_state, document_starts = ctx.saved_tensors
        dtype, (batch, sequence) = initial_state.dtype, values.shape[:2]
        chunks = _prepare(values, step_size, decay_rate, keys, queries, document_starts, ctx.chunk, dtype)
        groups, heads = chunks.keys.shape[1], chunks.steps.shape[3]
        gradient = _cut(output_gradient.to(dtype), ctx.chunk, groups)
        reach, survival = chunks.reach(), chunks.survival()
        weighted = chunks.written(survival)
        before, _ = _states(chunks, reach, weighted, initial_state)

        # Pairs of tokens within a chunk.
        gradient_by_head = gradient.transpose(2, 3).contiguous()
        decays = chunks.decays()
        pairs = decays * _product(chunks.queries, chunks.keys.mT)[:, :, None]
        values_gradient = _product(pairs.mT, gradient_by_head).transpose(2, 3)
        pairs_gradient = _product(gradient_by_head, chunks.stepped_by_head().mT)
        scores_gradient = decays.mul_(pairs_gradient).sum(2)
        exponents = pairs_gradient.mul_(pairs)
        # A token's pair with itself has no decay. Sums that nearly cancel, and then add up over the chunk.
        exponents.diagonal(dim1=-2, dim2=-1).zero_()
        total_gradient = (exponents.sum(-1).double() - exponents.sum(-2).double()).transpose(2, 3)
        queries_gradient = _product(scores_gradient, chunks.keys)
        keys_gradient = _product(scores_gradient.mT, chunks.queries)

        # What the tokens read from the state before their chunk.
        reading = gradient * reach[..., None]
        queries_gradient += _product(reading.flatten(-2), _by_rows(before).mT)
        before_gradient = _product(chunks.queries.mT, reading.flatten(-2)).unflatten(-1, (heads, -1))
        read = _product(chunks.queries, _by_rows(before)).view(gradient.shape)
        total_gradient += read.mul_(reading).sum(-1)

        # From the last chunk's state to the first's.
        before_gradient = before_gradient.unflatten(0, (batch, -1))
        keep = _keep(chunks, reach)
        after, initial_gradient = torch.empty_like(before), torch.empty_like(before[:, 0])
        after[:, -1] = final_gradient.to(dtype).unflatten(1, (groups, heads)).permute(0, 1, 4, 2, 3)
        places = [initial_gradient, *after.unbind(1)]
        for step in reversed(range(keep.shape[1])):
            torch.addcmul(before_gradient[:, step], places[step + 1], keep[:, step], out=places[step])
        keep_gradient = (after * before).sum((3, 5)) * keep[:, :, :, 0, :, 0]
        initial_gradient = initial_gradient.permute(0, 1, 3, 4, 2).flatten(1, 2)
        after_gradient = _by_rows(after)

        # What the tokens add to the state behind their chunk.
        keys_gradient += _product(weighted.flatten(-2), after_gradient.mT)
        written = _product(chunks.keys, after_gradient).view(gradient.shape).mul_(survival[..., None])
        lost = (written * chunks.values).sum(-1) * chunks.steps
        values_gradient = written.add_(values_gradient)
        total_gradient -= lost
        total_gradient[:, :, -1] += lost.sum(2) + keep_gradient.flatten(0, 1)

        log_decay_gradient = total_gradient.flip(2).cumsum(2).flip(2).to(dtype)
        rate = decay_rate.to(dtype).view(groups, 1, -1)
        step_gradient = log_decay_gradient * rate + (values_gradient * chunks.values).sum(-1)
        value_gradient = values_gradient.mul_(chunks.steps[..., None])
        skip_gradient = None
        if skip is not None:
            value_gradient.addcmul_(gradient, skip.to(dtype).view(groups, 1, -1, 1))
            skip_gradient = (gradient * chunks.values).sum((0, 2, 4)).flatten().to(skip.dtype)

        def joined(tensor: Tensor, like: Tensor) -> Tensor:
            return _join(tensor, batch, sequence).reshape(like.shape).to(like.dtype)

        return (
            joined(value_gradient, values),
            joined(step_gradient, step_size),
            (log_decay_gradient * chunks.steps).sum((0, 2)).flatten().to(decay_rate.dtype),
            joined(keys_gradient, keys),
            joined(queries_gradient, queries),
            skip_gradient,
            initial_gradient,
            None,
            None,
        )


def ssd_chunkwise(
    values: Tensor,
    step_size: Tensor,
    decay_rate: Tensor,
    keys: Tensor,
    queries: Tensor,
    skip: Tensor | None,
    initial_state: Tensor,
    document_starts: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Chunkwise form (Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060, section 6).

    Same arguments and results as ``kernels.ssd.ssd``, with the state given; exact gradients, once differentiable.
    """
    return _SSD.apply(
        values,
        step_size,
        decay_rate,
        keys,
        queries,
        skip,
        initial_state,
        document_starts,
        min(chunk_size, values.shape[1]),
    )
