"""The state-space recurrence on Triton kernels, as a differentiable function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import Executor, Launch, check_device, execute
from kernels.mlstm.triton_backward import forget_gradient_kernel
from kernels.ssd import triton_backward, triton_forward
from kernels.ssd.triton_problem import Problem, nearest_chunk, strides


class Inputs(NamedTuple):
    """What the kernels read: tensors of the caller with a last stride of one, and per head and token fp32."""

    values: Tensor  # (batch, sequence, heads, head_size)
    keys: Tensor  # (batch, sequence, groups, state_size)
    queries: Tensor
    steps: Tensor  # (batch * heads, sequence) contiguous
    decay: Tensor  # likewise: log decay from the beginning of the token's chunk
    documents: Tensor  # (batch, sequence) int32, counted from 0; one element where there are none
    skip: Tensor  # (heads,)

    def arguments(self, *names: str) -> dict[str, Any]:
        """The named tensors and their strides."""
        found: dict[str, Any] = {}
        for name in names:
            tensor = getattr(self, name)
            found[name] = tensor
            if name == "values":
                found |= strides(name, tensor)
            elif name in ("keys", "queries"):
                found |= strides(name, tensor, "group")
        return found


def _with_unit_last_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def prepare(
    problem: Problem,
    values: Tensor,
    step_size: Tensor,
    decay_rate: Tensor,
    keys: Tensor,
    queries: Tensor,
    skip: Tensor | None,
    document_starts: Tensor | None,
) -> Inputs:
    """Gathers what the kernels read; the small per-head tensors are computed here."""
    steps = step_size.float().transpose(1, 2).reshape(problem.rows, problem.sequence)
    padding = problem.num_chunks * problem.chunk - problem.sequence
    rates = decay_rate.float().repeat(problem.batch)[:, None]
    chunks = torch.nn.functional.pad(steps * rates, (0, padding)).unflatten(1, (problem.num_chunks, problem.chunk))
    decay = chunks.cumsum(2).flatten(1)[:, : problem.sequence].contiguous()
    if document_starts is None:
        documents = torch.zeros(1, dtype=torch.int32, device=values.device)
    else:
        documents = document_starts.cumsum(1, dtype=torch.int32)
    if skip is None:
        skip = torch.zeros(problem.heads, device=values.device)
    tensors = (_with_unit_last_stride(tensor) for tensor in (values, keys, queries))
    return Inputs(*tensors, steps.contiguous(), decay, documents, skip.float().contiguous())


def compute_states(problem: Problem, inputs: Inputs, initial_state: Tensor, launch: Executor) -> Tensor:
    """(batch * heads, chunks + 1, head_size, state_size) fp32: the state before every chunk and after the last."""
    shape = (problem.rows, problem.num_chunks + 1, problem.head_size, problem.state_size)
    states = torch.empty(shape, dtype=torch.float32, device=inputs.values.device)
    states[:, 0] = initial_state.flatten(0, 1)
    arguments = inputs.arguments("values", "keys", "steps", "decay", "documents")
    launch(
        Launch(
            triton_forward.ssd_state_kernel,
            (*problem.blocks("state"), problem.rows),
            {**arguments, "states": states, **problem.sizes()},
            **_options(problem, "state"),
        )
    )
    return states


def _options(problem: Problem, kernel: str) -> dict[str, Any]:
    entry = problem.configuration(kernel)
    constants = problem.constants(kernel)
    return {"constants": constants, "num_warps": entry.num_warps, "num_stages": entry.num_stages}


def ssd_forward(
    problem: Problem, inputs: Inputs, initial_state: Tensor, launch: Executor = execute
) -> tuple[Tensor, Tensor]:
    """All launches of the forward pass: outputs and final state."""
    states = compute_states(problem, inputs, initial_state, launch)
    outputs = torch.empty(inputs.values.shape, dtype=inputs.values.dtype, device=inputs.values.device)
    arguments = inputs.arguments("values", "keys", "queries", "steps", "decay", "documents", "skip")
    launch(
        Launch(
            triton_forward.ssd_output_kernel,
            (problem.blocks("output")[0], problem.num_tiles("output"), problem.rows),
            {**arguments, "states": states, "outputs": outputs, **strides("outputs", outputs), **problem.sizes()},
            **_options(problem, "output"),
        )
    )
    # A copy, so that the final state does not keep the states of all chunks in memory.
    return outputs, states[:, -1].unflatten(0, (problem.batch, problem.heads)).clone()


def ssd_backward(
    problem: Problem,
    inputs: Inputs,
    initial_state: Tensor,
    gradient: Tensor,
    final_gradient: Tensor,
    launch: Executor = execute,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All launches of the backward pass.

    Returns:
        Gradients of values; of step sizes through what they write, and of log decays, both (batch * heads, sequence);
        of keys and of queries (batch, sequence, groups, state_size), and of the initial state; fp32 but for the first.
    """
    states = compute_states(problem, inputs, initial_state, launch)
    state_gradients, carried = _state_gradients(problem, inputs, gradient, states, final_gradient, launch)
    common = inputs.arguments("values", "keys", "queries", "steps", "decay", "documents")
    common |= {"gradient": gradient, **strides("gradient", gradient)}

    value_gradient = torch.empty(inputs.values.shape, dtype=inputs.values.dtype, device=gradient.device)
    head_blocks = problem.blocks("value_gradient")[0]
    step_products = _empty(gradient, head_blocks, problem.rows, problem.sequence)
    results = {"value_gradient": value_gradient, "step_products": step_products, "state_gradients": state_gradients}
    launch(
        Launch(
            triton_backward.ssd_value_gradient_kernel,
            (head_blocks, problem.num_tiles("value_gradient"), problem.rows),
            {**common, **results, "skip": inputs.skip, **strides("result", value_gradient), **problem.sizes()},
            **_options(problem, "value_gradient"),
        )
    )
    shared = {}
    for name, kernel, read in (
        ("query_gradient", triton_backward.ssd_query_gradient_kernel, {"states": states}),
        ("key_gradient", triton_backward.ssd_key_gradient_kernel, {"state_gradients": state_gradients}),
    ):
        state_blocks = problem.blocks(name)[1]
        by_split = _empty(gradient, problem.splits, problem.batch, problem.groups, problem.sequence, problem.state_size)
        products = _empty(gradient, state_blocks, problem.rows, problem.sequence)
        launch(
            Launch(
                kernel,
                (state_blocks, problem.num_tiles(name), problem.batch * problem.groups * problem.splits),
                {**common, **read, name: by_split, "products": products, **problem.group_sizes()},
                **_options(problem, name),
            )
        )
        shared[name] = (by_split.sum(0).transpose(1, 2), products.sum(0))
    (query_gradient, reading), (key_gradient, writing) = shared["query_gradient"], shared["key_gradient"]
    decay_gradient = _empty(gradient, problem.rows, problem.sequence)
    launch(
        Launch(
            forget_gradient_kernel,
            (problem.num_chunks, problem.rows),
            {
                "token_products": reading - writing, "chunk_products": carried, "documents": inputs.documents,
                "forget_gradient": decay_gradient, "sequence": problem.sequence, "heads": problem.heads,
                "num_chunks": problem.num_chunks,
            },
            {"CHUNK": problem.chunk, "TILE": min(problem.chunk, 64), "HAS_DOCUMENTS": problem.has_documents},
        )
    )  # fmt: skip
    initial_gradient = state_gradients[:, 0].unflatten(0, (problem.batch, problem.heads)).clone()
    return value_gradient, step_products.sum(0), decay_gradient, key_gradient, query_gradient, initial_gradient


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _state_gradients(
    problem: Problem, inputs: Inputs, gradient: Tensor, states: Tensor, final_gradient: Tensor, launch: Executor
) -> tuple[Tensor, Tensor]:
    """The gradient of the state behind every chunk, and its product with that state (batch * heads, chunks + 1)."""
    state_gradients = torch.empty_like(states)
    state_gradients[:, -1] = final_gradient.flatten(0, 1)
    head_blocks, state_blocks = problem.blocks("state_gradient")
    products = _empty(states, problem.rows, problem.num_chunks + 1, head_blocks * state_blocks)
    arguments = inputs.arguments("queries", "decay", "documents")
    launch(
        Launch(
            triton_backward.ssd_state_gradient_kernel,
            (head_blocks, state_blocks, problem.rows),
            {
                **arguments, "gradient": gradient, **strides("gradient", gradient), "states": states,
                "state_gradients": state_gradients, "products": products, **problem.sizes(),
            },
            **_options(problem, "state_gradient"),
        )
    )  # fmt: skip
    # What lies before the first chunk scales with no decay.
    products[:, 0] = 0.0
    return state_gradients, products.sum(2)


class _SSDFunction(torch.autograd.Function):
    """Connects the launches to autograd; keeps the inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, step_size: Tensor, decay_rate: Tensor, keys: Tensor, queries: Tensor,
        skip: Tensor | None, initial_state: Tensor, document_starts: Tensor | None, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        problem = Problem.of(values, keys, chunk, document_starts is not None)
        inputs = prepare(problem, values, step_size, decay_rate, keys, queries, skip, document_starts)
        outputs, final_state = ssd_forward(problem, inputs, initial_state)
        ctx.save_for_backward(values, step_size, decay_rate, keys, queries, skip, initial_state, document_starts)
        ctx.problem = problem
        return outputs, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, final_gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, step_size, decay_rate, keys, queries, skip, initial_state, document_starts = ctx.saved_tensors
        problem: Problem = ctx.problem
        inputs = prepare(problem, values, step_size, decay_rate, keys, queries, skip, document_starts)
        gradient = _with_unit_last_stride(gradient)
        value_gradient, written, decay_gradient, key_gradient, query_gradient, initial_gradient = ssd_backward(
            problem, inputs, initial_state, gradient, final_gradient
        )
        rates = decay_rate.float().repeat(problem.batch)[:, None]
        step_gradient = (written + decay_gradient * rates).unflatten(0, (problem.batch, problem.heads)).transpose(1, 2)
        rate_gradient = (decay_gradient * inputs.steps).sum(1).unflatten(0, (problem.batch, problem.heads)).sum(0)
        skip_gradient = None
        if skip is not None:
            skip_gradient = (gradient.float() * values.float()).sum((0, 1, 3)).to(skip.dtype)
        return (
            value_gradient,
            step_gradient.to(step_size.dtype),
            rate_gradient.to(decay_rate.dtype),
            key_gradient.to(keys.dtype),
            query_gradient.to(queries.dtype),
            skip_gradient,
            initial_gradient,
            None,
            None,
        )


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
    """Same arguments and results as ``kernels.ssd.ssd``, with the state given; exact gradients.

    The backward pass computes the states at chunk boundaries again; nothing but the inputs is kept.

    Raises:
        ValueError: for dtypes or devices that do not fit.
    """
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not (
        values.dtype == keys.dtype == queries.dtype
    ):
        raise ValueError(
            "ssd: values, keys and queries must share one dtype out of float32, bfloat16 and float16 for the triton "
            f"backend, got {values.dtype}, {keys.dtype} and {queries.dtype}."
        )
    check_device(values, "ssd: values")
    chunk = nearest_chunk(chunk_size)
    return _SSDFunction.apply(
        values, step_size, decay_rate, keys, queries, skip, initial_state.float(), document_starts, chunk
    )
