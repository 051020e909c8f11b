"""The sLSTM on Triton kernels, as a differentiable function; `sequential_torch` explains the recurrence.

The kernels carry the state through the sequence. The gradient of the recurrent weights is one matrix product over all
tokens after the backward kernel has run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import Executor, Launch, check_device, execute, interpreter_is_active
from kernels.slstm import triton_backward, triton_forward
from kernels.slstm.state import (
    EMPTY,
    SLSTMState,
    check_inputs,
    from_mean_and_logarithm,
    to_mean_and_logarithm,
    zero_state,
)

# Sequences of one program: the fewest rows that a matrix product of Triton takes.
ROWS = 16


@dataclass(frozen=True)
class Configuration:
    """Channels of one tile, rows of the recurrent matrices read at once (None: all, once), warps and stages."""

    block: int
    block_inner: int | None
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Problem:
    """Sizes of one call, and the compile-time constants that follow from them."""

    batch: int
    sequence: int
    heads: int
    size: int
    has_documents: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, gates: Tensor, has_documents: bool) -> Problem:
        """The problem that (batch, sequence, 4, heads, size) gates pose."""
        batch, sequence, _, heads, size = gates.shape
        return cls(batch, sequence, heads, size, has_documents, gates.dtype)

    @property
    def dot_dtype(self) -> torch.dtype:
        # The interpreter stores bf16 as integers and computes nonsense with it.
        return torch.bfloat16 if self.dtype == torch.bfloat16 and not interpreter_is_active() else torch.float32

    @property
    def configuration(self) -> Configuration:
        """The largest heads that stay resident without spilling have 128 channels in bf16 and 32 in fp32."""
        block = max(16, triton.next_power_of_2(self.size))
        if self.dtype != torch.bfloat16:
            return Configuration(block, None, 4, 1) if block <= 32 else Configuration(32, 32, 4, 1)
        if block <= 128:
            return Configuration(block, None, 4 if block <= 64 else 8, 1)
        return Configuration(64, 128, 8, 2)

    def launch(self, kernels: dict[bool, Any], arguments: dict[str, Any], extra: dict[str, Any]) -> Launch:
        """The launch of the resident (True) or tiled (False) of two kernels."""
        entry = self.configuration
        resident = entry.block_inner is None
        constants = {
            "SIZE": self.size, "BLOCK": entry.block, "ROWS": ROWS, "HAS_DOCUMENTS": self.has_documents,
            "DOT_DTYPE": tl.bfloat16 if self.dot_dtype == torch.bfloat16 else tl.float32, "PRECISION": "ieee",
            **extra, **({} if resident else {"BLOCK_INNER": entry.block_inner}),
        }  # fmt: skip
        sizes = {"batch": self.batch, "sequence": self.sequence, "heads": self.heads}
        grid = (triton.cdiv(self.batch, ROWS), self.heads)
        return Launch(kernels[resident], grid, arguments | sizes, constants, entry.num_warps, entry.num_stages)


@dataclass(frozen=True)
class Trajectory:
    """What the forward pass leaves for the backward pass; `triton_forward` gives the layouts."""

    hiddens: Tensor
    means: Tensor
    saved: Tensor
    source: Tensor
    starts: Tensor


def slstm_forward(
    problem: Problem,
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    initial: tuple[Tensor, Tensor, Tensor, Tensor],
    document_starts: Tensor | None,
    launch: Executor = execute,
) -> tuple[Trajectory, Tensor, Tensor]:
    """The forward kernel.

    Args:
        initial: hidden state, mean, logarithm and stabilizer, float32 (batch, heads, size).

    Returns:
        The trajectory, and the final logarithm and stabilizer.
    """
    batch, sequence, _, heads, size = gates.shape
    hidden, mean, logarithm, stabilizer = initial
    hiddens = gates.new_empty(batch, sequence + 1, heads, size)
    means = mean.new_empty(hiddens.shape)
    hiddens[:, 0], means[:, 0] = hidden, mean
    logarithm, stabilizer = (t.clone(memory_format=torch.contiguous_format) for t in (logarithm, stabilizer))
    source = torch.full_like(logarithm, -1, dtype=torch.int32)
    saved = mean.new_empty(batch, sequence, 4, heads, size)
    starts = source if document_starts is None else document_starts.to(torch.int32).contiguous()
    strides = dict(zip(("batch", "token", "gate", "head"), gates.stride(), strict=False))
    launch(
        problem.launch(
            {True: triton_forward.slstm_forward_resident_kernel, False: triton_forward.slstm_forward_tiled_kernel},
            {
                "gates": gates, "weights": recurrent.permute(1, 0, 3, 2).to(problem.dot_dtype).contiguous(),
                "bias": bias.float().contiguous(), "starts": starts, "hiddens": hiddens, "means": means,
                "saved": saved, "logarithm": logarithm, "stabilizer": stabilizer, "source": source,
                **{f"gates_stride_{name}": stride for name, stride in strides.items()},
            },
            {"EMPTY": EMPTY},
        )
    )  # fmt: skip
    return Trajectory(hiddens, means, saved, source, starts), logarithm, stabilizer


def slstm_backward(
    problem: Problem,
    recurrent: Tensor,
    trajectory: Trajectory,
    output_gradient: Tensor,
    final_gradients: tuple[Tensor, Tensor, Tensor],
    launch: Executor = execute,
) -> tuple[Tensor, ...]:
    """The backward kernel, and the product for the recurrent weights.

    Args:
        output_gradient: (batch, sequence, heads, size), its last stride 1.
        final_gradients: of the final mean, logarithm and stabilizer, float32 (batch, heads, size).

    Returns:
        Gradients of gates, recurrent weights and bias, and of the initial hidden state, mean, logarithm and
        stabilizer, all but the gates' float32.
    """
    saved, source = trajectory.saved, trajectory.source
    batch, sequence, _, heads, size = saved.shape
    mean, logarithm, stabilizer = final_gradients
    through_mean = mean.clone(memory_format=torch.contiguous_format)
    negative_logarithm = logarithm.neg().contiguous()
    raw = output_gradient.new_empty(batch, sequence + 1, 4, heads, size, dtype=problem.dtype)
    raw[:, sequence].zero_()
    strides = dict(zip(("batch", "token", "head"), output_gradient.stride(), strict=False))
    launch(
        problem.launch(
            {True: triton_backward.slstm_backward_resident_kernel, False: triton_backward.slstm_backward_tiled_kernel},
            {
                "output_gradient": output_gradient,
                "weights": recurrent.transpose(0, 1).to(problem.dot_dtype).contiguous(),
                "starts": trajectory.starts, "means": trajectory.means, "saved": saved, "source": source,
                "stabilizer_gradient": stabilizer.contiguous(), "raw_gradients": raw,
                "through_mean": through_mean, "negative_logarithm": negative_logarithm,
                **{f"gradient_stride_{name}": stride for name, stride in strides.items()},
            },
            {},
        )
    )  # fmt: skip
    raw = raw[:, :sequence]
    previous = trajectory.hiddens[:, :sequence]
    hidden = torch.einsum("bghd,ghde->bhe", raw[:, 0].float(), recurrent.float())
    if problem.has_documents:
        previous = previous.masked_fill(trajectory.starts[:, :, None, None] != 0, 0.0)
        hidden = hidden.masked_fill(trajectory.starts[:, 0, None, None] != 0, 0.0)
    by_head = raw.permute(3, 2, 4, 0, 1).reshape(heads, 4 * size, batch * sequence)
    weights = torch.bmm(by_head, previous.permute(2, 0, 1, 3).reshape(heads, batch * sequence, size))
    return (
        raw,
        weights.float().view(heads, 4, size, size).transpose(0, 1),
        raw.sum((0, 1), dtype=torch.float32),
        hidden,
        through_mean,
        negative_logarithm.neg(),
        stabilizer.where(source < 0, 0.0),
    )


class _SLSTMFunction(torch.autograd.Function):
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
        gates = gates if gates.stride(-1) == 1 else gates.contiguous()
        problem = Problem.of(gates, document_starts is not None)
        initial = (initial_hidden, initial_mean, initial_logarithm, initial_stabilizer)
        trajectory, logarithm, stabilizer = slstm_forward(problem, gates, recurrent, bias, initial, document_starts)
        ctx.problem, ctx.bias_dtype = problem, bias.dtype
        ctx.save_for_backward(recurrent, *vars(trajectory).values())
        mean = trajectory.means[:, -1].clone()
        # In float32, where the trajectory has it in the dtype of the gates.
        hidden = trajectory.saved[:, -1, 3] * mean
        return trajectory.hiddens[:, 1:], hidden, mean, logarithm, stabilizer

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, output_gradient: Tensor, hidden_gradient: Tensor, *final_gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        recurrent, *rest = ctx.saved_tensors
        # The final hidden state is the last output.
        output_gradient = output_gradient.float()
        output_gradient = output_gradient.clone(memory_format=torch.contiguous_format)
        output_gradient[:, -1] += hidden_gradient
        gates, weights, bias, *initial = slstm_backward(
            ctx.problem, recurrent, Trajectory(*rest), output_gradient, final_gradients
        )
        return gates, weights.to(recurrent.dtype), bias.to(ctx.bias_dtype), *initial, None


def slstm_triton(
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    *,
    initial_state: SLSTMState | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, SLSTMState]:
    """The sLSTM on Triton kernels (Beck et al. 2024, "xLSTM", arXiv:2405.04517, section 2.2).

    Arguments and results as in ``kernels.slstm.slstm``. With bfloat16 gates the hidden states and the gradients of
    the gates are rounded to bfloat16 where they are multiplied by the recurrent matrices, and so are those.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    check_inputs(gates, recurrent, bias, initial_state, document_starts)
    if gates.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"slstm: gates must be float32, bfloat16 or float16 for the triton backend, got {gates.dtype}."
        )
    check_device(gates, "slstm: gates")
    state = zero_state(gates, torch.float32) if initial_state is None else initial_state
    state = SLSTMState(*(tensor.float() for tensor in state))
    output, *final = _SLSTMFunction.apply(
        gates, recurrent, bias, state.hidden, *to_mean_and_logarithm(state), document_starts
    )
    return output, from_mean_and_logarithm(*final)
