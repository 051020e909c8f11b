"""Nonlinear RNNs trained in parallel over the sequence by Newton's method.

``newton_gru`` and ``newton_lstm`` are the ParaRNN cells; ``newton_rnn`` takes any cell that acts on each channel
alone, given only its step function. Method: Danieli et al. 2025, "ParaRNN: Unlocking Parallel Training of Nonlinear
RNNs for Large Language Models", arXiv:2510.21450; here with a residual check and a sequential fallback, so that the
result does not depend on the weights being small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels.newton_rnn.arguments import BACKENDS, check_arguments, check_backend, choose_backend, compute_dtype
from kernels.newton_rnn.cell import Cell, StepCell
from kernels.newton_rnn.gru import GRUCell
from kernels.newton_rnn.lstm import LSTMCell
from kernels.newton_rnn.newton_segments import newton_solve_segments
from kernels.newton_rnn.newton_torch import NewtonReport, Settings, newton_solve
from kernels.newton_rnn.reference import recurrence_reference
from kernels.segments import Segments

__all__ = ["BACKENDS", "Cell", "NewtonReport", "newton_gru", "newton_lstm", "newton_rnn"]

ITERATIONS = 3
MAX_ITERATIONS = 8


def newton_gru(
    gates: Tensor,
    recurrent: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    iterations: int = ITERATIONS,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float | None = None,
    backend: str = "auto",
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor, NewtonReport]:
    """The ParaGRU over a sequence; the equations are in ``kernels.newton_rnn.gru.GRUCell``.

    Args:
        gates: (batch, sequence, 3, channels), pre-activations of z, r, n from the inputs, biases included.
        recurrent: (3, channels), diagonal recurrent weights of z, r, n.
        initial_state: h before the first token, (batch, channels); ``None`` is zero.
        document_starts, iterations, max_iterations, tolerance: as in ``newton_rnn``.
        backend: ``"reference"`` (loop over tokens under autograd), ``"torch"`` (Newton, any device), ``"sequential"``
            (loop over tokens forward, gradient by the parallel adjoint scan), ``"triton"`` (Newton in one kernel, on
            a GPU) or ``"auto"``: on a GPU Triton, and torch for float64; on a CPU torch, and sequential from
            ``WIDE_STATE`` state elements on, where it is faster.
        segments: where this call's tokens are one of several ranks' segments of the same sequences, the state of
            the first of which is zero: Newton's method over all of them (``kernels.newton_rnn.newton_segments``), in
            torch. Every rank makes this call, and none gives an initial state.

    Returns:
        h (batch, sequence, channels) in the dtype of ``gates``, the state after the last token (batch, channels) in
        the dtype of the arithmetic (float32, or float64 if any input is float64), and the report.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an unknown backend.
    """
    return _run(
        "newton_gru", GRUCell(), gates, {"recurrent": (recurrent, 3)}, initial_state, document_starts,
        Settings(iterations, max_iterations, tolerance), backend, segments,
    )  # fmt: skip


def newton_lstm(
    gates: Tensor,
    recurrent: Tensor,
    peephole: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    iterations: int = ITERATIONS,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float | None = None,
    backend: str = "auto",
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor, NewtonReport]:
    """The ParaLSTM over a sequence; the equations are in ``kernels.newton_rnn.lstm.LSTMCell``.

    Args:
        gates: (batch, sequence, 3, channels), pre-activations of f, o and the candidate, biases included.
        recurrent: (3, channels), diagonal recurrent weights of f, o and the candidate.
        peephole: (2, channels), weights of f on the old cell and of o on the new one.
        initial_state: (c, h) before the first token, (batch, 2, channels); ``None`` is zero.
        document_starts, iterations, max_iterations, tolerance: as in ``newton_rnn``.
        backend, segments: as in ``newton_gru``.

    Returns:
        h (batch, sequence, channels) in the dtype of ``gates``, (c, h) after the last token (batch, 2, channels) in
        the dtype of the arithmetic, and the report.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an unknown backend.
    """
    return _run(
        "newton_lstm", LSTMCell(), gates, {"recurrent": (recurrent, 3), "peephole": (peephole, 2)}, initial_state,
        document_starts, Settings(iterations, max_iterations, tolerance), backend, segments,
    )  # fmt: skip


def newton_rnn(
    step: Callable[..., Tensor] | Cell,
    inputs: Tensor,
    parameters: Sequence[Tensor] = (),
    *,
    components: int | None = None,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    iterations: int = ITERATIONS,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, NewtonReport]:
    """Any recurrent cell that acts on each channel alone, over a sequence, solved for all tokens together.

    Args:
        step: ``step(state, inputs, *parameters) -> state`` on many tokens at once: states are (batch, tokens,
            channels), or (batch, tokens, K, channels), inputs (batch, tokens, ..., channels), and parameters are
            passed whole. No channel, token or sequence may influence another. It must be differentiable by
            ``torch.func``; tensors that it closes over get no gradient. Or a ``Cell``, whose Jacobian may be
            written out.
        inputs: (batch, sequence, ..., channels).
        parameters: tensors of any shape, passed in the dtype of the arithmetic.
        components: K, the numbers per channel in the state; ``None`` is one, without a dimension for it. A
            ``Cell`` brings its own.
        initial_state: the state before the first token, (batch, channels) or (batch, K, channels); ``None`` is zero.
        document_starts: (batch, sequence) bool, True at each document's first token, before which the state becomes
            exactly zero. ``None`` is one document that continues the initial state.
        iterations: Newton steps before the residual is first looked at.
        max_iterations: Newton steps after which blocks of tokens still above the tolerance are solved sequentially.
        tolerance: largest residual |h_t - f(h_{t-1}, x_t)|, relative to the larger of 1 and the largest state;
            ``None`` is 16 units of rounding of the dtype. Newton's method converges quadratically, so what passes is
            usually at the level of rounding. Below about two units nothing passes and all is solved sequentially.
        backend: as in ``newton_gru``, without ``"triton"``.

    Returns:
        The states (batch, sequence, ...) in the dtype of ``inputs``, the state after the last token in the dtype of
        the arithmetic (float32, or float64 if any tensor is float64), and the report.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an unknown backend.
    """
    cell = step if isinstance(step, Cell) else StepCell(step, components)
    if inputs.dim() < 3 or 0 in inputs.shape:
        raise ValueError(
            "newton_rnn: inputs must have shape (batch, sequence, ..., channels), none of them zero, "
            f"got {tuple(inputs.shape)}."
        )
    state_shape = _state_shape(cell, inputs)
    check_arguments(
        "newton_rnn", inputs, {"initial_state": (initial_state, state_shape)}, document_starts,
        iterations, max_iterations, tolerance,
    )  # fmt: skip
    check_backend("newton_rnn", backend, tuple(name for name in BACKENDS if name != "triton"))
    backend = choose_backend(backend, math.prod(state_shape), inputs.is_cuda, False, has_kernel=False)
    settings = Settings(iterations, max_iterations, tolerance, is_sequential=backend == "sequential")
    states, final, report = _solve(cell, inputs, parameters, initial_state, document_starts, settings, backend)
    return states.to(inputs.dtype), final, report


def _state_shape(cell: Cell, inputs: Tensor) -> tuple[int, ...]:
    components = () if cell.components is None else (cell.components,)
    return (inputs.shape[0], *components, inputs.shape[-1])


def _solve(
    cell: Cell, inputs: Tensor, parameters: Sequence[Tensor], initial_state: Tensor | None,
    document_starts: Tensor | None, settings: Settings, backend: str, segments: Segments | None = None,
) -> tuple[Tensor, Tensor, NewtonReport]:  # fmt: skip
    """All states and the last one, in the dtype of the arithmetic, by the loop or by Newton's method in torch."""
    dtype = compute_dtype(inputs, *parameters, initial_state)
    if initial_state is None:
        initial_state = torch.zeros(_state_shape(cell, inputs), dtype=dtype, device=inputs.device)
    initial_state, parameters = initial_state.to(dtype), [parameter.to(dtype) for parameter in parameters]
    if segments is not None:
        return newton_solve_segments(cell, inputs, parameters, initial_state, document_starts, settings, segments)
    if backend == "reference":
        states = recurrence_reference(cell, inputs, parameters, initial_state, document_starts)
        count = torch.zeros((), dtype=torch.int64, device=inputs.device)
        return states, states[:, -1], NewtonReport(count.float(), count, count)
    return newton_solve(cell, inputs, parameters, initial_state, document_starts, settings)


def _run(
    name: str, cell: GRUCell | LSTMCell, gates: Tensor, parameters: dict[str, tuple[Tensor, int]],
    initial_state: Tensor | None, document_starts: Tensor | None, settings: Settings, backend: str,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, NewtonReport]:  # fmt: skip
    """One of the hand-written cells with any backend; the hidden state is the last component."""
    if gates.dim() != 4 or gates.shape[2] != 3 or 0 in gates.shape:
        raise ValueError(
            f"{name}: gates must have shape (batch, sequence, 3, channels), none of them zero, "
            f"got {tuple(gates.shape)}."
        )
    expected = {argument: (tensor, (rows, gates.shape[-1])) for argument, (tensor, rows) in parameters.items()}
    expected["initial_state"] = (initial_state, _state_shape(cell, gates))
    check_arguments(
        name, gates, expected, document_starts, settings.iterations, settings.max_iterations, settings.tolerance
    )
    check_backend(name, backend)
    tensors = [tensor for tensor, _ in parameters.values()]
    is_double = compute_dtype(gates, *tensors, initial_state).itemsize == 8
    elements = math.prod(_state_shape(cell, gates))
    if segments is not None and initial_state is not None:
        raise ValueError(f"{name}: the state before a segment is what segments say; give no initial_state.")
    backend = choose_backend(backend, elements, gates.is_cuda, is_double, has_kernel=True)
    if backend == "triton" and segments is None:
        # Imported here because Triton is slow to import and absent from some CPU installations.
        from kernels.newton_rnn.newton_triton import newton_triton

        return newton_triton(cell, gates, tensors, initial_state, document_starts, settings)
    settings = replace(settings, is_sequential=backend == "sequential")
    states, final, report = _solve(cell, gates, tensors, initial_state, document_starts, settings, backend, segments)
    return _hidden(cell, states).to(gates.dtype), final, report


def _hidden(cell: Cell, states: Tensor) -> Tensor:
    """The last component, which is what a layer returns."""
    return states if cell.components is None else states[:, :, -1]
