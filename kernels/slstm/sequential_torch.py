"""The sLSTM as a loop of few preallocated operations per token, with a hand-written exact backward.

In unstabilised terms the normalizer is a sum of exponentials and the cell a weighted sum of candidates with the same
weights, so ``mean = cell / normalizer`` is a weighted mean and the cell can be carried as the mean and the logarithm
of the normalizer alone, for which no stabilizer is needed::

    a_t = logarithm_{t-1} + logsigmoid(f_t)          w_t = sigmoid(i_t - a_t)
    logarithm_t = logaddexp(a_t, i_t)                mean_t = mean_{t-1} + w_t (tanh(z_t) - mean_{t-1})
    hidden_t = sigmoid(o_t) mean_t

The stabilizer of the published form is the running maximum of the same sums. It is carried along for the state that
is returned, and nothing else depends on it: its gradient goes to the one token that set the maximum, and to the
forget gates after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.slstm.state import (
    EMPTY,
    SLSTMState,
    compute_dtype,
    from_mean_and_logarithm,
    to_mean_and_logarithm,
    zero_state,
)

log_sigmoid = torch._C._nn.log_sigmoid


def _start_masks(document_starts: Tensor | None, sequence: int) -> list[Tensor | None]:
    """For each token the sequences where a document begins, (1, batch, 1), or None where none does."""
    if document_starts is None:
        return [None] * sequence
    masks = document_starts.t()[:, None, :, None].unbind()
    return [mask if begins else None for mask, begins in zip(masks, document_starts.any(0).tolist(), strict=True)]


def stabilizer_source(
    input_gate: Tensor, log_forget: Tensor, initial_stabilizer: Tensor, document_starts: Tensor | None
) -> Tensor:
    """The token whose input gate set the final stabilizer, or -1 where the initial stabilizer did.

    Args:
        input_gate, log_forget: (sequence, heads, batch, head_size).
        initial_stabilizer: (heads, batch, head_size).
        document_starts: (batch, sequence) bool or None.
    """
    # Differences of long sums are compared, so they are kept in float64.
    running = log_forget.cumsum(0, dtype=torch.float64)
    candidates = torch.cat((initial_stabilizer[None].double(), input_gate.double() - running))
    if document_starts is not None:
        last = document_starts.cumsum(1) == document_starts.sum(1, keepdim=True)
        before = ~last.t()[:, None, :, None]
        candidates[1:].masked_fill_(before, -torch.inf)
        candidates[0].masked_fill_(document_starts.any(1)[None, :, None], -torch.inf)
    return candidates.argmax(0) - 1


class _SLSTMSequential(torch.autograd.Function):
    """Tensors of the loop are (sequence, heads, batch, ...), so that each step is contiguous."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        recurrent: Tensor,
        bias: Tensor,
        initial_hidden: Tensor,
        initial_mean: Tensor,
        initial_logarithm: Tensor,
        initial_stabilizer: Tensor,
        document_starts: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        dtype = initial_hidden.dtype
        batch, sequence, _, heads, size = gates.shape
        activations = gates.new_empty(sequence, heads, batch, 4, size, dtype=dtype)
        torch.add(gates.permute(1, 3, 0, 2, 4), bias.to(dtype).transpose(0, 1)[:, None], out=activations)
        weights = recurrent.to(dtype).permute(1, 3, 0, 2).reshape(heads, size, 4 * size)
        write, means, hiddens = (activations.new_empty(sequence, heads, batch, size) for _ in range(3))
        mean, hidden, first_stabilizer = (
            tensor.transpose(0, 1).contiguous() for tensor in (initial_mean, initial_hidden, initial_stabilizer)
        )
        logarithm, stabilizer = initial_logarithm.transpose(0, 1).clone(), first_stabilizer.clone()
        decayed = torch.empty_like(mean)

        tokens = zip(
            activations.flatten(3).unbind(),
            *(slot.unbind() for slot in activations.unbind(3)),
            write.unbind(),
            means.unbind(),
            hiddens.unbind(),
            _start_masks(document_starts, sequence),
            strict=True,
        )
        for raw, input_gate, forget, candidate, output_gate, weight, next_mean, next_hidden, starts in tokens:
            if starts is not None:
                hidden = hidden.masked_fill(starts, 0.0)
                logarithm.masked_fill_(starts, EMPTY)
                stabilizer.masked_fill_(starts, EMPTY)
            raw.baddbmm_(hidden, weights)
            candidate.tanh_()
            output_gate.sigmoid_()
            log_sigmoid(forget, out=forget)
            torch.add(logarithm, forget, out=decayed)
            torch.logaddexp(decayed, input_gate, out=logarithm)
            torch.sub(input_gate, decayed, out=decayed)
            torch.sigmoid(decayed, out=weight)
            mean = torch.lerp(mean, candidate, weight, out=next_mean)
            hidden = torch.mul(output_gate, mean, out=next_hidden)
            torch.maximum(stabilizer.add_(forget), input_gate, out=stabilizer)

        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            activations, write, means, recurrent, initial_hidden, initial_mean, first_stabilizer, document_starts
        )
        ctx.input_dtypes = gates.dtype, bias.dtype
        final = (hidden, mean, logarithm, stabilizer)
        # Copies, so that a final state does not keep the buffers of all tokens in memory.
        output = hiddens.permute(2, 0, 1, 3)
        output = output.clone() if output.dtype == gates.dtype else output.to(gates.dtype)
        return output, *(tensor.transpose(0, 1).clone(memory_format=torch.contiguous_format) for tensor in final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # Read once: activation checkpointing recomputes them when they are read, and refuses a second time.
        saved = ctx.saved_tensors
        with torch.autocast(saved[0].device.type, enabled=False):
            return _backward(ctx, saved, *gradients)


def _backward(
    ctx: Any,
    saved: tuple[Tensor, ...],
    output_gradient: Tensor | None,
    hidden_gradient: Tensor | None,
    mean_gradient: Tensor | None,
    logarithm_gradient: Tensor | None,
    stabilizer_gradient: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of ``_SLSTMSequential.forward``, in their order."""
    activations, write, means, recurrent, initial_hidden, initial_mean, first_stabilizer, document_starts = saved
    sequence, heads, batch, _, size = activations.shape
    input_gate, log_forget, candidate, output_gate = activations.unbind(3)
    weights = recurrent.to(activations.dtype).transpose(0, 1).reshape(heads, 4 * size, size)

    def heads_first(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return activations.new_zeros(heads, batch, size)
        return tensor.to(activations.dtype).transpose(0, 1).contiguous()

    # What each gradient is multiplied by, for all tokens at once. ``keep`` is exactly 0 at a document's start.
    keep = 1 - write
    previous_mean = torch.cat((initial_mean.transpose(0, 1)[None], means[:-1]))
    of_candidate = write * (1 - candidate.square())
    of_weight = (candidate - previous_mean).mul_(write).mul_(keep)
    of_output = (1 - output_gate).mul_(output_gate).mul_(means)
    of_forget = torch.expm1(log_forget)

    hidden_gradients = activations.new_zeros(sequence, heads, batch, size)
    if output_gradient is not None:
        hidden_gradients.copy_(output_gradient.permute(1, 2, 0, 3))
    if hidden_gradient is not None:
        hidden_gradients[-1].add_(hidden_gradient.transpose(0, 1))
    # Heads outermost, as the product for the recurrent weights reads it.
    raw_gradients = activations.new_empty(heads, sequence, batch, 4, size)
    through_mean, negative_logarithm = heads_first(mean_gradient), heads_first(logarithm_gradient).neg_()
    scratch, of_mean = torch.empty_like(through_mean), torch.empty_like(through_mean)
    initial_stabilizer_gradient = None
    through_maximum: list[tuple[Tensor, Tensor]] | None = None
    if stabilizer_gradient is not None:
        source = stabilizer_source(input_gate, log_forget, first_stabilizer, document_starts)
        routed = heads_first(stabilizer_gradient)
        initial_stabilizer_gradient = routed.where(source < 0, 0.0).transpose(0, 1)
        positions = torch.arange(sequence, device=source.device)[:, None, None, None]
        to_input = routed.where(positions == source, 0.0)
        to_forget = of_forget.neg().mul_(routed).masked_fill_(positions <= source, 0.0)
        through_maximum = list(zip(to_input.unbind(), to_forget.unbind(), strict=True))

    per_token = (hidden_gradients, output_gate, of_output, of_candidate, of_weight, of_forget, keep)
    tokens = list(
        zip(
            *(tensor.unbind() for tensor in per_token),
            raw_gradients.flatten(3).unbind(1),
            *(slot.unbind(1) for slot in raw_gradients.unbind(3)),
            _start_masks(document_starts, sequence),
            strict=True,
        )
    )
    recurrent_gradient: Tensor | None = None
    for token in range(sequence - 1, -1, -1):
        (
            hidden, output, output_factor, candidate_factor, weight_factor, forget_factor, kept,
            raw, to_input_gate, to_forget_gate, to_candidate, to_output_gate, starts,
        ) = tokens[token]  # fmt: skip
        if recurrent_gradient is not None:
            hidden.add_(recurrent_gradient)
        torch.addcmul(through_mean, hidden, output, out=of_mean)
        torch.mul(hidden, output_factor, out=to_output_gate)
        torch.mul(of_mean, candidate_factor, out=to_candidate)
        torch.mul(of_mean, weight_factor, out=scratch).addcmul_(negative_logarithm, kept)
        torch.sub(scratch, negative_logarithm, out=to_input_gate)
        torch.mul(scratch, forget_factor, out=to_forget_gate)
        torch.mul(of_mean, kept, out=through_mean)
        negative_logarithm, scratch = scratch, negative_logarithm
        if through_maximum is not None:
            to_input, to_forget = through_maximum[token]
            to_input_gate.add_(to_input)
            to_forget_gate.add_(to_forget)
        recurrent_gradient = torch.bmm(raw, weights, out=recurrent_gradient)
        if starts is not None:
            recurrent_gradient.masked_fill_(starts, 0.0)

    previous_hidden = activations.new_empty(heads, sequence, batch, size)
    previous_hidden[:, 0] = initial_hidden.transpose(0, 1)
    torch.mul(output_gate[:-1].transpose(0, 1), means[:-1].transpose(0, 1), out=previous_hidden[:, 1:])
    if document_starts is not None:
        previous_hidden.masked_fill_(document_starts.t()[None, :, :, None], 0.0)
    flat_gradients = raw_gradients.view(heads, -1, 4 * size)
    weight_gradient = torch.bmm(flat_gradients.mT, previous_hidden.view(heads, -1, size))
    bias_gradient = raw_gradients.sum((1, 2)).transpose(0, 1)
    gates_dtype, bias_dtype = ctx.input_dtypes
    return (
        raw_gradients.permute(2, 1, 3, 0, 4).to(gates_dtype),
        weight_gradient.view(heads, 4, size, size).transpose(0, 1).to(recurrent.dtype),
        bias_gradient.to(bias_dtype),
        recurrent_gradient.transpose(0, 1),
        through_mean.transpose(0, 1),
        negative_logarithm.neg_().transpose(0, 1),
        initial_stabilizer_gradient,
        None,
    )


def slstm_sequential(
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    *,
    initial_state: SLSTMState | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, SLSTMState]:
    """The sLSTM on torch operations (Beck et al. 2024, "xLSTM", arXiv:2405.04517, section 2.2).

    Same arguments and results as ``kernels.slstm.slstm``. Not twice differentiable.
    """
    dtype = compute_dtype(gates, recurrent, bias)
    state = zero_state(gates, dtype) if initial_state is None else initial_state
    state = SLSTMState(*(tensor.to(dtype) for tensor in state))
    with torch.autocast(gates.device.type, enabled=False):
        output, hidden, mean, logarithm, stabilizer = _SLSTMSequential.apply(
            gates, recurrent, bias, state.hidden, *to_mean_and_logarithm(state), document_starts
        )
        return output, from_mean_and_logarithm(hidden, mean, logarithm, stabilizer)
