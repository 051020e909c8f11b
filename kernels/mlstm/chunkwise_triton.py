"""The chunkwise mLSTM on Triton kernels, as a differentiable function.

Gradients are exact, including those through the denominator, through `epsilon`, through the stabilizer and
across chunk boundaries. The stabilizer m needs care. In unstabilised terms (C exp(m), n exp(m)) neither the
states nor the outputs depend on it, except that epsilon is added to the stabilised denominator and that the
returned states are the stabilised ones. So dL/dm is -<dh, h> epsilon / Z at every token (Z is the divisor of
h), plus dm_T - <C_T, dC_T> - <n_T, dn_T> at the last. Each flows back along the running maximum: through the
forget gates while the carried m wins, and into the input gate, or the initial m, that set it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import Executor, check_device, execute
from kernels.mlstm import triton_launches as launches
from kernels.mlstm.state import MLSTMState, check_inputs, zero_state
from kernels.mlstm.triton_problem import MAXIMUM_CHUNK, Problem


def mlstm_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    initial_state: MLSTMState | None = None,
    document_starts: Tensor | None = None,
    chunk_size: int = 64,
    epsilon: float = 1e-6,
) -> tuple[Tensor, MLSTMState]:
    """The mLSTM recurrence over a sequence on Triton kernels (Beck et al. 2024, "xLSTM", arXiv:2405.04517).

    The chunkwise form with intra-chunk tiles follows Beck et al. 2025, "Tiled Flash Linear Attention"
    (arXiv:2503.14376). The backward pass recomputes the states at the chunk boundaries instead of keeping
    them; it stores the inputs, the output and four fp32 scalars per token and head.

    Args:
        query, key: (batch, sequence, heads, query_key_size), fp32, bf16 or fp16, any strides.
        value: (batch, sequence, heads, value_size), in the same dtype as query and key.
        input_gate, forget_gate: (batch, sequence, heads), pre-activations after any soft cap.
        initial_state: fp32 state before the first token; None is the zero state.
        document_starts: (batch, sequence) bool, True at each document's first token: there the carried state
            becomes exactly zero.
        chunk_size: tokens between two stored states, a power of two from 16 to 512. A larger one reads and
            writes fewer states and computes more inside the chunk; results agree up to rounding.
        epsilon: added to the denominator.

    Returns:
        Outputs (batch, sequence, heads, value_size) in the dtype of value, and the fp32 state after the last
        token.

    Raises:
        ValueError: for shapes, dtypes, devices or a chunk size that do not fit.
    """
    check_inputs(query, key, value, input_gate, forget_gate, initial_state, document_starts, chunk_size)
    if not 16 <= chunk_size <= MAXIMUM_CHUNK or chunk_size & (chunk_size - 1):
        raise ValueError(
            f"mlstm: chunk_size must be a power of two from 16 to {MAXIMUM_CHUNK} for the triton backend, "
            f"got {chunk_size}."
        )
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not (
        query.dtype == key.dtype == value.dtype
    ):
        raise ValueError(
            "mlstm: query, key and value must share one dtype out of float32, bfloat16 and float16 for the "
            f"triton backend, got {query.dtype}, {key.dtype} and {value.dtype}."
        )
    check_device(query, "mlstm: query")
    state = zero_state(query, value) if initial_state is None else initial_state
    output, *final_state = _MLSTMFunction.apply(
        query, key, value, input_gate, forget_gate, *(tensor.float() for tensor in state),
        document_starts, chunk_size, epsilon,
    )  # fmt: skip
    return output, MLSTMState(*final_state)


def mlstm_forward(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, input_gate: Tensor, forget_gate: Tensor,
    initial_state: MLSTMState, document_starts: Tensor | None, launch: Executor = execute,
) -> tuple[Tensor, MLSTMState, Tensor, launches.Gates]:  # fmt: skip
    """All launches of the forward pass: outputs, final state, denominators and gate quantities."""
    gates = launches.compute_gates(
        problem, input_gate, forget_gate, initial_state.stabilizer.contiguous(), document_starts, launch
    )
    states, normalizers = launches.compute_states(
        problem, key, value, gates, initial_state.matrix, initial_state.normalizer, launch
    )
    output, denominator = launches.compute_output(problem, query, key, value, gates, states, normalizers, launch)
    rows = (problem.batch, problem.heads)
    # Copies, so that the final state does not keep the states of all chunks in memory.
    final_state = MLSTMState(
        states[:, -1].unflatten(0, rows).clone(),
        normalizers[:, -1].unflatten(0, rows).clone(),
        gates.boundary[:, -1].unflatten(0, rows).clone(),
    )
    return output, final_state, denominator, gates


def mlstm_backward(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, forget_gate: Tensor,
    initial_matrix: Tensor, initial_normalizer: Tensor, output: Tensor, denominator: Tensor,
    gates: launches.Gates, output_gradient: Tensor, state_gradient: MLSTMState, launch: Executor = execute,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All launches of the backward pass.

    Returns:
        Gradients of query, key, value, input gate, forget gate and of the initial matrix, normalizer and
        stabilizer, the last three fp32.
    """
    states, normalizers = launches.compute_states(
        problem, key, value, gates, initial_matrix, initial_normalizer, launch
    )
    gradient = launches.compute_output_gradient(problem, output, output_gradient, denominator, gates, launch)
    state_gradients, normalizer_gradients, chunk_products = launches.compute_state_gradients(
        problem, query, gates, gradient, states, normalizers, state_gradient.matrix,
        state_gradient.normalizer, launch,
    )  # fmt: skip
    query_gradient, key_gradient, value_gradient, key_products = launches.compute_token_gradients(
        problem, query, key, value, gates, gradient, states, normalizers, state_gradients,
        normalizer_gradients, launch,
    )  # fmt: skip
    log_forget_gradient = launches.compute_forget_gradient(
        problem, gates, gradient.query_product - key_products, chunk_products, launch
    )

    stabilizer_gradient = gradient.stabilizer_gradient.double()
    stabilizer_gradient[:, -1] += state_gradient.stabilizer.flatten().double() - chunk_products[:, -1]
    through_forget, through_input, through_initial = _route_stabilizer_gradient(problem, gates, stabilizer_gradient)
    rows = (problem.batch, problem.heads)
    log_forget_gradient = (log_forget_gradient + through_forget).unflatten(0, rows).transpose(1, 2)
    input_gradient = (key_products + through_input).unflatten(0, rows).transpose(1, 2)
    forget_gradient = log_forget_gradient * torch.sigmoid(-forget_gate.float())
    return (
        query_gradient,
        key_gradient,
        value_gradient,
        input_gradient,
        forget_gradient,
        state_gradients[:, 0].unflatten(0, rows).clone(),
        normalizer_gradients[:, 0].unflatten(0, rows).clone(),
        (chunk_products[:, 0] + through_initial).unflatten(0, rows),
    )


def _route_stabilizer_gradient(
    problem: Problem, gates: launches.Gates, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Send dL/dm back along the running maximum.

    Where the carried maximum wins, everything that arrives at m_t goes on to the forget gate of t and, unless
    a document starts at t, to m_{t-1}; where the input wins, it ends in the input gate of t.

    Args:
        gradient: dL/dm, fp64 (batch * heads, sequence). In fp64 a sum over a run of tokens may be taken as
            the difference of two sums over the rest of the sequence.

    Returns:
        fp32 gradients of the log forget gates and of the input gates (batch * heads, sequence), and of the
        initial stabilizer (batch * heads,).
    """
    carried = gates.stabilizer > gates.log_input
    passes_on = carried
    if problem.has_documents:
        previous = torch.nn.functional.pad(gates.documents[:, :-1], (1, 0))
        starts = (gates.documents != previous).repeat_interleave(problem.heads, dim=0)
        passes_on = carried & ~starts
    # `stop[t]` is the first token after t whose m does not come from the one before it.
    position = torch.arange(problem.sequence, device=gradient.device).expand_as(gradient)
    stop = position.masked_fill(passes_on, problem.sequence).flip(-1).cummin(-1).values.flip(-1)
    stop = torch.nn.functional.pad(stop[:, 1:], (0, 1), value=problem.sequence)
    suffix = torch.nn.functional.pad(gradient.flip(-1).cumsum(-1).flip(-1), (0, 1))
    arriving = (suffix[:, :-1] - suffix.gather(-1, stop)).float()
    initial = torch.where(passes_on[:, 0], arriving[:, 0], 0.0)
    return arriving * carried, arriving * ~carried, initial


class _MLSTMFunction(torch.autograd.Function):
    """Connects the launches to autograd."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, input_gate: Tensor, forget_gate: Tensor,
        matrix: Tensor, normalizer: Tensor, stabilizer: Tensor, document_starts: Tensor | None,
        chunk_size: int, epsilon: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        query, key, value = (_with_unit_last_stride(tensor) for tensor in (query, key, value))
        problem = Problem.of(query, value, chunk_size, epsilon, document_starts is not None)
        output, final_state, denominator, gates = mlstm_forward(
            problem, query, key, value, input_gate, forget_gate, MLSTMState(matrix, normalizer, stabilizer),
            document_starts,
        )  # fmt: skip
        ctx.problem = problem
        ctx.gate_dtypes = (input_gate.dtype, forget_gate.dtype)
        ctx.save_for_backward(
            query, key, value, forget_gate, matrix, normalizer, output, denominator, gates.log_input,
            gates.decay, gates.stabilizer, gates.boundary, gates.documents,
        )  # fmt: skip
        return output, *final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, output_gradient: Tensor, matrix: Tensor, normalizer: Tensor, stabilizer: Tensor
    ) -> tuple[Tensor | None, ...]:
        *inputs, log_input, decay, token_stabilizer, boundary, documents = ctx.saved_tensors
        gates = launches.Gates(log_input, decay, token_stabilizer, boundary, documents)
        gradients = mlstm_backward(
            ctx.problem, *inputs, gates, _with_unit_last_stride(output_gradient),
            MLSTMState(matrix, normalizer, stabilizer),
        )  # fmt: skip
        query, key, value, input_gate, forget_gate, *initial_state = gradients
        input_dtype, forget_dtype = ctx.gate_dtypes
        return (
            query, key, value, input_gate.to(input_dtype), forget_gate.to(forget_dtype), *initial_state,
            None, None, None,
        )  # fmt: skip


def _with_unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its last stride is one, as the kernels require, or else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
