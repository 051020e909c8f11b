"""The chunkwise state-space recurrence on Triton kernels, as a differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import Executor, check_device, execute
from kernels.ssd import triton_launches as launches
from kernels.ssd.triton_problem import MAXIMUM_CHUNK, MINIMUM_CHUNK, Problem


def nearest_chunk(chunk_size: int) -> int:
    """The largest chunk of this form that is not above ``chunk_size``: a power of two from 16 to 512."""
    return min(MAXIMUM_CHUNK, max(MINIMUM_CHUNK, 1 << (chunk_size.bit_length() - 1)))


def ssd_triton(
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
    """Chunkwise form (Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060, section 6), exact gradients.

    Same arguments and results as ``kernels.ssd.ssd``, with the state given; values, keys and queries of one dtype out
    of float32, bfloat16 and float16, with any strides. The backward pass computes the states at chunk boundaries and
    the scores again: only the inputs are kept.

    Raises:
        ValueError: for dtypes or devices that do not fit.
    """
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    if values.dtype not in allowed or not values.dtype == keys.dtype == queries.dtype:
        raise ValueError(
            "ssd: values, keys and queries must share one dtype out of float32, bfloat16 and float16 for the triton "
            f"backend, got {values.dtype}, {keys.dtype} and {queries.dtype}."
        )
    for name, tensor in (("step_size", step_size), ("decay_rate", decay_rate), ("skip", skip)):
        if tensor is not None and tensor.dtype == torch.float64:
            raise ValueError(f"ssd: {name} is float64, in which the triton backend does not compute.")
    if initial_state.dtype != torch.float32:
        raise ValueError(f"ssd: initial_state must be float32 for the triton backend, got {initial_state.dtype}.")
    check_device(values, "ssd: values")
    return _SSDFunction.apply(
        values, step_size, decay_rate, keys, queries, skip, initial_state, document_starts, nearest_chunk(chunk_size)
    )


def ssd_forward(
    problem: Problem, inputs: launches.Inputs, initial_state: Tensor, launch: Executor = execute
) -> tuple[Tensor, Tensor]:
    """All launches of the forward pass: outputs and final state."""
    states = launches.compute_states(problem, inputs, initial_state, launch)
    scores = launches.compute_scores(problem, inputs, launch)
    outputs = launches.compute_outputs(problem, inputs, scores, states, launch)
    # A copy, so that the final state does not keep the states of all chunks in memory.
    return outputs, states[:, -1].unflatten(0, (problem.batch, problem.heads)).clone()


def ssd_backward(
    problem: Problem,
    inputs: launches.Inputs,
    decay_rate: Tensor,
    initial_state: Tensor,
    output_gradient: Tensor,
    final_gradient: Tensor,
    launch: Executor = execute,
) -> tuple[Tensor, ...]:
    """All launches of the backward pass.

    Returns:
        Gradients of values, step sizes, decay rates, keys, queries, skip (garbage where there is none) and initial
        state; those of values, keys and queries in their dtype, others fp32.
    """
    states = launches.compute_states(problem, inputs, initial_state, launch)
    scores = launches.compute_scores(problem, inputs, launch)
    state_gradients, keep_products = launches.compute_state_gradients(
        problem, inputs, output_gradient, states, final_gradient, launch
    )
    score_gradients, pair_products = launches.compute_score_gradients(problem, inputs, output_gradient, scores, launch)
    queries, read_products = launches.compute_query_gradient(
        problem, inputs, output_gradient, score_gradients, states, launch
    )
    keys = launches.compute_key_gradient(problem, inputs, score_gradients, state_gradients, launch)
    of_values = launches.compute_value_gradient(problem, inputs, output_gradient, scores, state_gradients, launch)
    log_decay = launches.compute_decay_gradient(
        problem, inputs, pair_products + read_products, of_values.lost_products, keep_products, launch
    )

    def per_head(by_token: Tensor) -> Tensor:
        return by_token.unflatten(0, (problem.batch, problem.heads)).sum((0, 2))

    rate = decay_rate.float().repeat(problem.batch)[:, None]
    steps = of_values.step_products + rate * log_decay
    return (
        of_values.values,
        steps.unflatten(0, (problem.batch, problem.heads)).transpose(1, 2),
        per_head(log_decay * inputs.steps),
        keys,
        queries,
        per_head(of_values.skip_products),
        state_gradients[:, 0].unflatten(0, (problem.batch, problem.heads)).clone(),
    )


class _SSDFunction(torch.autograd.Function):
    """Connects the launches to autograd."""

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
        values, keys, queries = (_with_unit_last_stride(tensor) for tensor in (values, keys, queries))
        problem = Problem.of(values, keys, chunk, document_starts is not None, skip is not None)
        inputs = launches.prepare(problem, values, step_size, decay_rate, keys, queries, skip, document_starts)
        ctx.problem = problem
        ctx.save_for_backward(values, step_size, decay_rate, keys, queries, skip, initial_state, document_starts)
        return ssd_forward(problem, inputs, initial_state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor, final_gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, step_size, decay_rate, keys, queries, skip, initial_state, document_starts = ctx.saved_tensors
        problem = ctx.problem
        inputs = launches.prepare(problem, values, step_size, decay_rate, keys, queries, skip, document_starts)
        gradients = ssd_backward(
            problem, inputs, decay_rate, initial_state, _with_unit_last_stride(output_gradient), final_gradient
        )
        of_values, of_steps, of_rate, of_keys, of_queries, of_skip, of_initial_state = gradients
        return (
            of_values,
            of_steps.to(step_size.dtype),
            of_rate.to(decay_rate.dtype),
            of_keys,
            of_queries,
            None if skip is None else of_skip.to(skip.dtype),
            of_initial_state,
            None,
            None,
        )


def _with_unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its last stride is one, as the kernels require, or else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
