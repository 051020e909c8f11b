"""The launches of the Newton solvers on a GPU, and their connection to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import Executor, Launch, check_device, execute
from kernels.newton_rnn import triton_gru, triton_lstm
from kernels.newton_rnn.arguments import compute_dtype
from kernels.newton_rnn.cell import Cell
from kernels.newton_rnn.newton_torch import NewtonReport, Settings

# Components of the state -> forward and backward kernel with the tokens and channels of a program's tile and its
# warps. Fixed rather than tuned at run time, and never keyed on the sequence length.
KERNELS = {
    1: ((triton_gru.newton_gru_kernel, 32, 32, 4), (triton_gru.newton_gru_backward_kernel, 32, 32, 8)),
    2: ((triton_lstm.newton_lstm_kernel, 32, 32, 4), (triton_lstm.newton_lstm_backward_kernel, 16, 32, 4)),
}


def _weights(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("recurrent", "peephole"), parameters, strict=False))


def newton_forward(
    gates: Tensor, parameters: Sequence[Tensor], initial: Tensor, cuts: Tensor | None, settings: Settings,
    launch: Executor = execute,
) -> tuple[Tensor, NewtonReport]:  # fmt: skip
    """All states, fp32 (batch, sequence, [2,] channels), and the report; contiguous tensors, weights in fp32."""
    batch, sequence, _, channels = gates.shape
    kernel, block_time, block_channels, num_warps = KERNELS[len(parameters)][0]
    grid = (triton.cdiv(channels, block_channels), batch)
    states = initial.new_empty(batch, sequence, *initial.shape[1:])
    residuals = initial.new_empty(grid[0] * batch)
    counts = torch.empty(grid[0] * batch, 2, dtype=torch.int32, device=gates.device)
    launch(
        Launch(
            kernel,
            grid,
            {
                "gates": gates, **_weights(parameters), "initial": initial, "cuts": initial if cuts is None else cuts,
                "states": states, "residuals": residuals, "counts": counts, "sequence": sequence,
                "channels": channels, "tolerance": settings.threshold(torch.float32),
            },
            {
                "ITERATIONS": settings.iterations, "MAX_ITERATIONS": settings.max_iterations,
                "HAS_CUTS": cuts is not None, "BLOCK_TIME": block_time, "BLOCK_CHANNELS": block_channels,
            },
            num_warps,
        )
    )  # fmt: skip
    return states, NewtonReport(residuals.max(), counts[:, 0].max().long(), counts[:, 1].sum())


def newton_backward(
    gates: Tensor, parameters: Sequence[Tensor], initial: Tensor, cuts: Tensor | None, states: Tensor,
    hidden_gradient: Tensor, final_gradient: Tensor, launch: Executor = execute,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The gradients of the initial state, the gates and each parameter; contiguous tensors."""
    batch, sequence, _, channels = gates.shape
    kernel, block_time, block_channels, num_warps = KERNELS[len(parameters)][1]
    gates_gradient, initial_gradient = torch.empty_like(gates), torch.empty_like(initial)
    partial = [parameter.new_empty(batch, *parameter.shape) for parameter in parameters]
    launch(
        Launch(
            kernel,
            (triton.cdiv(channels, block_channels), batch),
            {
                "gates": gates, **_weights(parameters), "initial": initial, "cuts": initial if cuts is None else cuts,
                "states": states, "states_gradient": hidden_gradient, "final_gradient": final_gradient,
                "gates_gradient": gates_gradient, "initial_gradient": initial_gradient, "sequence": sequence,
                "channels": channels, **{f"{name}_gradient": sums for name, sums in _weights(partial).items()},
            },
            {"HAS_CUTS": cuts is not None, "BLOCK_TIME": block_time, "BLOCK_CHANNELS": block_channels},
            num_warps,
        )
    )  # fmt: skip
    return initial_gradient, gates_gradient, [sums.sum(0) for sums in partial]


class _NewtonTriton(torch.autograd.Function):
    """Connects the launches to autograd; keeps the gates and the states in fp32."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, cuts: Tensor | None, initial: Tensor, gates: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        states, report = newton_forward(gates, parameters, initial, cuts, settings)
        ctx.save_for_backward(cuts, initial, gates, states, *parameters)
        ctx.mark_non_differentiable(*report)
        hidden = states if len(parameters) == 1 else states[:, :, 1]
        # Copies, since both are views of what is kept for the backward pass, which a caller may not change.
        hidden = hidden.to(gates.dtype, memory_format=torch.contiguous_format, copy=True)
        return hidden, states[:, -1].clone(), *report

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, hidden_gradient: Tensor, final_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        cuts, initial, gates, states, *parameters = ctx.saved_tensors
        initial_gradient, gates_gradient, gradients = newton_backward(
            gates, parameters, initial, cuts, states, hidden_gradient.contiguous(), final_gradient.contiguous()
        )
        return None, None, initial_gradient, gates_gradient, *gradients


def newton_triton(
    cell: Cell, gates: Tensor, parameters: Sequence[Tensor], initial_state: Tensor | None,
    document_starts: Tensor | None, settings: Settings,
) -> tuple[Tensor, Tensor, NewtonReport]:  # fmt: skip
    """The Triton form of the GRU (one parameter) and the LSTM (two); meaning as in ``kernels.newton_rnn``.

    Raises:
        ValueError: for float64, or tensors on a CPU without Triton's interpreter.
    """
    if compute_dtype(gates, *parameters, initial_state) == torch.float64:
        raise ValueError("The Triton form of newton_gru and newton_lstm has no float64; use the torch form.")
    check_device(gates, "gates")
    batch, _, _, channels = gates.shape
    if initial_state is None:
        components = () if cell.components is None else (cell.components,)
        initial_state = torch.zeros(batch, *components, channels, device=gates.device)
    cuts = None if document_starts is None else document_starts.contiguous()
    weights = [parameter.float().contiguous() for parameter in parameters]
    hidden, final, *report = _NewtonTriton.apply(
        settings, cuts, initial_state.float().contiguous(), gates.contiguous(), *weights
    )
    return hidden, final, NewtonReport(*report)
