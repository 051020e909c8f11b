"""The causal convolution as multiply-adds of shifted inputs, with a backward pass written by hand.

Both passes go through the sequence in blocks that stay in a core's cache, so that each tensor is read from memory once
and written once. Nothing but the inputs is kept for the backward pass, which computes the sums of products again.

The first ``width - 1`` tokens of a document are computed apart, from their own taps: no term of the document before
enters and is taken away again, so that not even its infinities leak.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

# Elements of a block, 1 MiB in float32: the fastest measured on one core with 2 MiB of cache.
_BLOCK_ELEMENTS = 262144


class _Cut(NamedTuple):
    """The tokens of one block whose window reaches back over the beginning of their document."""

    token: Tensor  # (n,) within the block
    row: Tensor  # (n,) of the batch
    inside: Tensor  # (n, width, 1) bool, which taps belong to the token's document

    def taps(self, extended: Tensor) -> Tensor:
        """What each token reads of a block of inputs with ``width - 1`` more in front, (n, width, channels)."""
        return extended[self.places(), self.row[:, None]].masked_fill(~self.inside, 0.0)

    def places(self) -> Tensor:
        """Where the taps lie in such a block, (n, width)."""
        return self.token[:, None] + torch.arange(self.inside.shape[1], device=self.token.device)


class _Blocks:
    """A problem with the sequence first, cut into blocks."""

    def __init__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, starts: Tensor | None):
        self.dtype, self.width = state.dtype, weight.shape[1]
        self.inputs, self.state = inputs.transpose(0, 1), state.transpose(0, 1)
        # A row for each tap, so that each multiplies contiguous channels by contiguous weights.
        self.taps = weight.to(self.dtype).mT.contiguous()
        self.bias = None if bias is None else bias.to(self.dtype)
        self.starts = None if starts is None else starts.t()
        self.length = max(self.width, _BLOCK_ELEMENTS // max(1, inputs.shape[0] * inputs.shape[2]))
        sequence = self.inputs.shape[0]
        self.bounds = [(first, min(first + self.length, sequence)) for first in range(0, sequence, self.length)]
        self.cuts = [None] * len(self.bounds) if starts is None or self.width == 1 else self._find_cuts()

    def _find_cuts(self) -> list[_Cut | None]:
        back = torch.arange(self.width - 1, -1, -1, device=self.starts.device)
        position = torch.arange(self.starts.shape[0], device=self.starts.device)[:, None]
        # Before the first start the window reaches into the state, which belongs to the document that goes on.
        since = position - position.where(self.starts, -self.width).cummax(0).values
        token, row = torch.nonzero(since < self.width - 1, as_tuple=True)
        inside = (back <= since[token, row, None])[..., None]
        edges = torch.searchsorted(token, torch.tensor([first for first, _ in self.bounds], device=token.device))
        cuts: list[_Cut | None] = []
        for (first, _), low, high in zip(self.bounds, edges.tolist(), [*edges[1:].tolist(), len(token)], strict=True):
            part = slice(low, high)
            cuts.append(_Cut(token[part] - first, row[part], inside[part]) if high > low else None)
        return cuts

    def extended(self, first: int, last: int) -> Tensor:
        """Inputs of a block with ``width - 1`` more in front, in the dtype of the arithmetic."""
        begin = first - self.width + 1
        inputs = self.inputs[max(begin, 0) : last].to(self.dtype)
        return inputs if begin >= 0 else torch.cat([self.state[begin:], inputs])

    def sums(self, extended: Tensor, cut: _Cut | None, out: Tensor | None = None) -> Tensor:
        """``bias + sum_w weight[:, w] x_{t - width + 1 + w}`` of a block."""
        length = extended.shape[0] - self.width + 1
        last = extended[self.width - 1 :]
        if self.bias is None:
            sums = torch.mul(last, self.taps[-1], out=out)
        else:
            sums = torch.addcmul(self.bias, last, self.taps[-1], out=out)
        for tap in range(self.width - 1):
            sums.addcmul_(extended[tap : tap + length], self.taps[tap])
        if cut is not None:
            own = (cut.taps(extended) * self.taps).sum(1)
            sums[cut.token, cut.row] = own if self.bias is None else own + self.bias
        return sums

    def of_current_document(self, last: Tensor) -> Tensor:
        """``last`` (width - 1, batch, channels), the last tokens, zero where a document begins after them."""
        if self.starts is None:
            return last
        sequence = self.starts.shape[0]
        position = torch.arange(sequence, device=last.device)[:, None]
        latest = position.where(self.starts, -self.width).amax(0)
        # Places below 0 are the state's; a start at token 0 cuts them off too.
        place = torch.arange(sequence - self.width + 1, sequence, device=last.device)[:, None]
        return last.masked_fill((place < latest)[..., None], 0.0)


def empty_as(inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor as ``inputs``, dense, batch and sequence in the same order in memory."""
    batch, sequence, channels = inputs.shape
    if inputs.stride(0) < inputs.stride(1):
        return inputs.new_empty(sequence, batch, channels, dtype=dtype).transpose(0, 1)
    return inputs.new_empty(batch, sequence, channels, dtype=dtype)


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor,
        document_starts: Tensor | None,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(inputs, weight, bias, initial_state, document_starts)
        outputs = empty_as(inputs)
        by_token, in_place = outputs.transpose(0, 1), inputs.dtype == blocks.dtype
        for (first, last), cut in zip(blocks.bounds, blocks.cuts, strict=True):
            here = by_token[first:last]
            sums = blocks.sums(blocks.extended(first, last), cut, here if in_place else None)
            if activation == "silu":
                silu(sums, inplace=True)
            if not in_place:
                here.copy_(sums)
        final = blocks.of_current_document(blocks.extended(inputs.shape[1], inputs.shape[1]))
        ctx.save_for_backward(inputs, weight, bias, initial_state, document_starts)
        ctx.activation = activation
        return outputs, final.transpose(0, 1).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor, final_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, initial_state, document_starts = ctx.saved_tensors
        blocks = _Blocks(inputs, weight, bias, initial_state, document_starts)
        dtype, width, taps = blocks.dtype, blocks.width, blocks.taps
        reach = width - 1
        output_gradient = output_gradient.transpose(0, 1)
        input_gradient = empty_as(inputs)
        by_token = input_gradient.transpose(0, 1)
        weight_gradient = torch.zeros_like(taps)
        bias_gradient = torch.zeros_like(taps[0])
        batch, channels = inputs.shape[0], inputs.shape[2]
        # What the blocks behind this one give to the last ``reach`` of the inputs that it reads.
        carried = blocks.of_current_document(final_gradient.transpose(0, 1).to(dtype))
        for (first, last), cut in zip(reversed(blocks.bounds), reversed(blocks.cuts), strict=True):
            extended, length = blocks.extended(first, last), last - first
            gradient = output_gradient[first:last].to(dtype)
            if ctx.activation == "silu":
                gradient = torch.ops.aten.silu_backward(gradient, blocks.sums(extended, cut))
            if bias is not None:
                bias_gradient += gradient.flatten(0, 1).sum(0)
            if cut is not None:
                own = gradient[cut.token, cut.row]
                gradient = gradient.clone() if ctx.activation == "none" else gradient
                gradient[cut.token, cut.row] = 0.0
            # Gradients of this block's inputs and of the ``reach`` inputs before them.
            spread = gradient.new_empty(length + reach, batch, channels)
            torch.mul(gradient, taps[-1], out=spread[reach:])
            spread[:reach] = 0.0
            spread[length:] += carried
            product = torch.empty_like(gradient, memory_format=torch.contiguous_format)
            for tap in range(width):
                torch.mul(extended[tap : tap + length], gradient, out=product)
                weight_gradient[tap] += product.flatten(0, 1).sum(0)
                if tap < reach:
                    spread[tap : tap + length].addcmul_(gradient, taps[tap])
            if cut is not None:
                weight_gradient += (cut.taps(extended) * own[:, None]).sum(0)
                places = (cut.places() * batch + cut.row[:, None]).flatten()
                own = (own[:, None] * taps).masked_fill(~cut.inside, 0.0)
                spread.flatten(0, 1).index_add_(0, places, own.flatten(0, 1))
            by_token[first:last] = spread[reach:]
            carried = spread[:reach]
        return (
            input_gradient,
            weight_gradient.mT.to(weight.dtype),
            None if bias is None else bias_gradient.to(bias.dtype),
            carried.transpose(0, 1),
            None,
            None,
        )


def causal_conv1d_torch(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    document_starts: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """As ``kernels.conv1d.causal_conv1d`` with the state given. Not twice differentiable."""
    return _CausalConvolution.apply(inputs, weight, bias, initial_state, document_starts, activation)
