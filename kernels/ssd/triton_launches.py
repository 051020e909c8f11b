"""The launches of the chunkwise state-space recurrence: which kernel runs on which grid with which tensors.

Every function takes the executor of its launches, so that the same code runs the kernels or, on tensors of the `meta`
device, only lists them for compilation ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.launch import Executor, Launch
from kernels.ssd import triton_backward as backward_kernels
from kernels.ssd import triton_backward_tokens as token_kernels
from kernels.ssd import triton_forward as forward_kernels
from kernels.ssd.triton_problem import Configuration, Problem


def strides_of(name: str, tensor: Tensor, third: str = "head") -> dict[str, int]:
    """The run-time stride arguments of a (batch, sequence, heads or groups, size) tensor."""
    return {f"{name}_stride_{axis}": tensor.stride(index) for index, axis in enumerate(("batch", "token", third))}


@dataclass(frozen=True)
class Inputs:
    """What every launch reads: the inputs, with a last stride of one, and what follows from them per token."""

    values: Tensor
    keys: Tensor
    queries: Tensor
    skip: Tensor  # unused without a skip
    steps: Tensor  # fp32 (batch * heads, sequence)
    decay: Tensor  # likewise: log decays accumulated from the start of the chunk
    documents: Tensor  # (batch, sequence) int32 number of document starts so far; unused without documents

    def per_token(self) -> dict[str, Tensor]:
        return {"decay": self.decay, "documents": self.documents}


def prepare(
    problem: Problem, values: Tensor, step_size: Tensor, decay_rate: Tensor, keys: Tensor, queries: Tensor,
    skip: Tensor | None, document_starts: Tensor | None,
) -> Inputs:  # fmt: skip
    """The cheap part, O(batch * sequence * heads)."""
    steps = step_size.float().transpose(1, 2).reshape(problem.rows, problem.sequence).contiguous()
    rate = decay_rate.float().repeat(problem.batch)[:, None]
    padded = problem.num_chunks * problem.chunk - problem.sequence
    decay = torch.nn.functional.pad(steps * rate, (0, padded)).unflatten(1, (-1, problem.chunk)).cumsum(2)
    decay = decay.flatten(1)[:, : problem.sequence].contiguous()
    if document_starts is None:
        documents = torch.zeros(1, dtype=torch.int32, device=values.device)
    else:
        documents = document_starts.cumsum(1, dtype=torch.int32).contiguous()
    skip = decay if skip is None else skip.float().contiguous()
    return Inputs(values, keys, queries, skip, steps, decay, documents)


def _launch(
    problem: Problem, kernel: Any, entry: Configuration, grid: tuple[int, ...], arguments: dict[str, Any],
    launch: Executor, **constants: Any,
) -> None:  # fmt: skip
    """Passes on those of the problem's sizes and constants that the kernel takes."""
    sizes = {
        "sequence": problem.sequence, "heads": problem.heads, "groups": problem.groups, "slices": problem.slices,
        "heads_per_group": problem.heads // problem.groups, "num_chunks": problem.num_chunks, "rows": problem.rows,
    }  # fmt: skip
    names = set(kernel.arg_names)
    constants = {**problem.constants(entry), **constants}
    launch(
        Launch(
            kernel,
            grid,
            {**arguments, **{name: size for name, size in sizes.items() if name in names}},
            {name: value for name, value in constants.items() if name in names},
            entry.num_warps,
            entry.num_stages,
        )
    )


def compute_scores(problem: Problem, inputs: Inputs, launch: Executor) -> Tensor:
    """(batch * groups, sequence, chunk) in the dtype of tiles; above the diagonal's tiles undefined."""
    of_groups = problem.batch * problem.groups
    scores = torch.empty(
        of_groups, problem.sequence, problem.chunk, dtype=problem.tile_dtype, device=inputs.values.device
    )
    arguments = {
        "queries": inputs.queries, "keys": inputs.keys, "scores": scores,
        **strides_of("query", inputs.queries, "group"), **strides_of("key", inputs.keys, "group"),
    }  # fmt: skip
    grid = (problem.num_tiles, problem.tiles_per_chunk, of_groups)
    _launch(problem, forward_kernels.ssd_score_kernel, problem.configuration("score"), grid, arguments, launch)
    return scores


def compute_states(problem: Problem, inputs: Inputs, initial_state: Tensor, launch: Executor) -> Tensor:
    """The state at every chunk boundary, fp32; slot 0 is the initial state and the last slot the final one."""
    states = inputs.decay.new_empty(problem.rows, problem.num_chunks + 1, problem.head_size, problem.state_size)
    states[:, 0].copy_(initial_state.flatten(0, 1))
    entry = problem.configuration("state")
    arguments = {
        "values": inputs.values, "keys": inputs.keys, "steps": inputs.steps, **inputs.per_token(), "states": states,
        **strides_of("value", inputs.values), **strides_of("key", inputs.keys, "group"),
    }  # fmt: skip
    grid = (problem.heads, problem.state_blocks(entry), problem.batch * problem.value_blocks(entry))
    _launch(problem, forward_kernels.ssd_state_kernel, entry, grid, arguments, launch)
    return states


def compute_outputs(problem: Problem, inputs: Inputs, scores: Tensor, states: Tensor, launch: Executor) -> Tensor:
    """Outputs in the dtype of the values."""
    outputs = torch.empty(inputs.values.shape, dtype=inputs.values.dtype, device=inputs.values.device)
    entry = problem.configuration("output")
    arguments = {
        "values": inputs.values, "queries": inputs.queries, "scores": scores, "steps": inputs.steps,
        **inputs.per_token(), "states": states, "skip": inputs.skip, "outputs": outputs,
        **strides_of("value", inputs.values), **strides_of("query", inputs.queries, "group"),
        **strides_of("output", outputs),
    }  # fmt: skip
    grid = (problem.heads, problem.num_tiles, problem.batch * problem.value_blocks(entry))
    kernel = forward_kernels.ssd_output_kernel
    _launch(problem, kernel, entry, grid, arguments, launch, HAS_SKIP=problem.has_skip)
    return outputs


def compute_state_gradients(
    problem: Problem, inputs: Inputs, gradient: Tensor, states: Tensor, final_gradient: Tensor, launch: Executor
) -> tuple[Tensor, Tensor]:
    """The states' gradients, laid out as the states, and what each chunk keeps of the state times its gradient."""
    state_gradients = torch.empty_like(states)
    state_gradients[:, -1].copy_(final_gradient.flatten(0, 1))
    entry = problem.configuration("state_gradient")
    blocks = problem.value_blocks(entry) * problem.state_blocks(entry)
    keep_products = states.new_empty(blocks, problem.rows, problem.num_chunks)
    arguments = {
        "queries": inputs.queries, "output_gradient": gradient, **inputs.per_token(), "states": states,
        "state_gradients": state_gradients, "keep_products": keep_products,
        **strides_of("query", inputs.queries, "group"), **strides_of("gradient", gradient),
    }  # fmt: skip
    grid = (problem.heads, problem.state_blocks(entry), problem.batch * problem.value_blocks(entry))
    _launch(problem, backward_kernels.ssd_state_gradient_kernel, entry, grid, arguments, launch)
    return state_gradients, keep_products.sum(0)


def compute_score_gradients(
    problem: Problem, inputs: Inputs, gradient: Tensor, scores: Tensor, launch: Executor
) -> tuple[Tensor, Tensor]:
    """The scores' gradients by slices, and fp32 (batch * heads, sequence): pairs as readers less pairs as sources."""
    of_slices = problem.batch * problem.slices
    score_gradients = scores.new_empty(of_slices, problem.sequence, problem.chunk)
    products = inputs.decay.new_zeros(2, problem.tiles_per_chunk, problem.rows, problem.sequence)
    arguments = {
        "values": inputs.values, "output_gradient": gradient, "scores": scores, "steps": inputs.steps,
        **inputs.per_token(), "score_gradients": score_gradients, "reader_products": products[0],
        "source_products": products[1], **strides_of("value", inputs.values), **strides_of("gradient", gradient),
    }  # fmt: skip
    grid = (problem.num_tiles, problem.tiles_per_chunk, of_slices)
    entry = problem.configuration("score_gradient")
    _launch(problem, backward_kernels.ssd_score_gradient_kernel, entry, grid, arguments, launch)
    as_reader, as_source = products.sum(1)
    return score_gradients, as_reader - as_source


@dataclass(frozen=True)
class ValueGradient:
    """What the values' gradients give: themselves, and inner products per token, fp32 (batch * heads, sequence)."""

    values: Tensor
    step_products: Tensor
    lost_products: Tensor
    skip_products: Tensor


def compute_value_gradient(
    problem: Problem, inputs: Inputs, gradient: Tensor, scores: Tensor, state_gradients: Tensor, launch: Executor
) -> ValueGradient:
    result = torch.empty(inputs.values.shape, dtype=inputs.values.dtype, device=inputs.values.device)
    entry = problem.configuration("value_gradient")
    products = inputs.decay.new_empty(3, problem.value_blocks(entry), problem.rows, problem.sequence)
    arguments = {
        "values": inputs.values, "keys": inputs.keys, "output_gradient": gradient, "scores": scores,
        "steps": inputs.steps, **inputs.per_token(), "state_gradients": state_gradients, "skip": inputs.skip,
        "value_gradient": result, "step_products": products[0], "lost_products": products[1],
        "skip_products": products[2], **strides_of("value", inputs.values), **strides_of("key", inputs.keys, "group"),
        **strides_of("gradient", gradient), **strides_of("result", result),
    }  # fmt: skip
    grid = (problem.heads, problem.num_tiles, problem.batch * problem.value_blocks(entry))
    kernel = token_kernels.ssd_value_gradient_kernel
    _launch(problem, kernel, entry, grid, arguments, launch, HAS_SKIP=problem.has_skip)
    return ValueGradient(result, *products.sum(1))


def _of_groups(problem: Problem, by_slice: Tensor, like: Tensor) -> Tensor:
    """(batch, sequence, slices, state) added up to groups."""
    if problem.slices == problem.groups:
        return by_slice
    return by_slice.unflatten(2, (problem.groups, -1)).sum(3).to(like.dtype)


def _new_by_slice(problem: Problem, like: Tensor) -> Tensor:
    """For gradients by slices: fp32 where they are yet to be added up."""
    dtype = like.dtype if problem.slices == problem.groups else torch.float32
    shape = (problem.batch, problem.sequence, problem.slices, problem.state_size)
    return torch.empty(shape, dtype=dtype, device=like.device)


def compute_query_gradient(
    problem: Problem, inputs: Inputs, gradient: Tensor, score_gradients: Tensor, states: Tensor, launch: Executor
) -> tuple[Tensor, Tensor]:
    """The queries' gradients, and what tokens read from states times its gradient, fp32 (batch * heads, sequence)."""
    result = _new_by_slice(problem, inputs.queries)
    entry = problem.configuration("query_gradient")
    products = inputs.decay.new_empty(problem.state_blocks(entry), problem.rows, problem.sequence)
    arguments = {
        "queries": inputs.queries, "keys": inputs.keys, "output_gradient": gradient,
        "score_gradients": score_gradients, **inputs.per_token(), "states": states, "query_gradient": result,
        "read_products": products, **strides_of("query", inputs.queries, "group"),
        **strides_of("key", inputs.keys, "group"), **strides_of("gradient", gradient),
    }  # fmt: skip
    grid = (problem.slices, problem.num_tiles, problem.batch * problem.state_blocks(entry))
    _launch(problem, token_kernels.ssd_query_gradient_kernel, entry, grid, arguments, launch)
    return _of_groups(problem, result, inputs.queries), products.sum(0)


def compute_key_gradient(
    problem: Problem, inputs: Inputs, score_gradients: Tensor, state_gradients: Tensor, launch: Executor
) -> Tensor:
    result = _new_by_slice(problem, inputs.keys)
    entry = problem.configuration("key_gradient")
    arguments = {
        "values": inputs.values, "queries": inputs.queries, "score_gradients": score_gradients,
        "steps": inputs.steps, **inputs.per_token(), "state_gradients": state_gradients, "key_gradient": result,
        **strides_of("value", inputs.values), **strides_of("query", inputs.queries, "group"),
    }  # fmt: skip
    grid = (problem.slices, problem.num_tiles, problem.batch * problem.state_blocks(entry))
    _launch(problem, token_kernels.ssd_key_gradient_kernel, entry, grid, arguments, launch)
    return _of_groups(problem, result, inputs.keys)


def compute_decay_gradient(
    problem: Problem, inputs: Inputs, token_products: Tensor, lost_products: Tensor, keep_products: Tensor,
    launch: Executor,
) -> Tensor:  # fmt: skip
    """The gradient of every token's log decay, fp32 (batch * heads, sequence)."""
    result = torch.empty_like(inputs.decay)
    arguments = {
        "token_products": token_products, "lost_products": lost_products, "keep_products": keep_products,
        "documents": inputs.documents, "decay_gradient": result,
    }  # fmt: skip
    grid = (problem.num_tiles, problem.rows)
    entry = problem.configuration("score_gradient")
    _launch(problem, backward_kernels.ssd_decay_gradient_kernel, entry, grid, arguments, launch)
    return result
