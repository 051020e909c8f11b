"""The launches of the chunkwise mLSTM: which kernel runs on which grid with which tensors.

Every function takes the executor of its launches, so that the same code runs the kernels or, on tensors of
the `meta` device, only lists them for compilation ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn.functional import logsigmoid

from kernels.launch import Executor, Launch
from kernels.mlstm import triton_backward as backward_kernels
from kernels.mlstm import triton_backward_tokens as token_kernels
from kernels.mlstm import triton_forward as forward_kernels
from kernels.mlstm.triton_problem import Problem


def strides_of(name: str, tensor: Tensor) -> dict[str, int]:
    """The run-time stride arguments of a (batch, sequence, heads, size) tensor."""
    axes = ("batch", "token", "head")
    return {f"{name}_stride_{axis}": tensor.stride(index) for index, axis in enumerate(axes)}


def rows_first(gate: Tensor) -> Tensor:
    """(batch, sequence, heads) to contiguous fp32 (batch * heads, sequence)."""
    batch, sequence, heads = gate.shape
    return gate.float().transpose(1, 2).reshape(batch * heads, sequence).contiguous()


@dataclass(frozen=True)
class Gates:
    """Per-token gate quantities, fp32 (batch * heads, sequence), and what belongs to the boundaries."""

    log_input: Tensor
    decay: Tensor  # log forget gates accumulated from the start of the chunk or document
    stabilizer: Tensor
    boundary: Tensor  # stabilizer at chunk boundaries, (batch * heads, num_chunks + 1)
    documents: Tensor  # (batch, sequence) int32 number of document starts so far; unused without documents

    def arguments(self) -> dict[str, Tensor]:
        return {"decay": self.decay, "documents": self.documents, "boundary": self.boundary}


def compute_gates(
    problem: Problem, input_gate: Tensor, forget_gate: Tensor, initial_stabilizer: Tensor,
    document_starts: Tensor | None, launch: Executor,
) -> Gates:  # fmt: skip
    """The cheap part, O(batch * sequence * heads): decays and the running maximum of every token."""
    log_input = rows_first(input_gate)
    log_forget = logsigmoid(rows_first(forget_gate))
    if document_starts is None:
        documents = torch.zeros(1, dtype=torch.int32, device=log_input.device)
    else:
        documents = document_starts.cumsum(1, dtype=torch.int32).contiguous()
    decay, local = torch.empty_like(log_input), torch.empty_like(log_input)
    sizes = {"sequence": problem.sequence, "heads": problem.heads}
    launch(
        Launch(
            forward_kernels.gate_scan_kernel,
            (problem.num_chunks, problem.rows),
            {
                "log_forget": log_forget, "log_input": log_input, "documents": documents, "decay": decay,
                "local_stabilizer": local, **sizes,
            },
            problem.scan_constants(),
        )
    )  # fmt: skip
    boundary = log_input.new_empty(problem.rows, problem.num_chunks + 1)
    launch(
        Launch(
            forward_kernels.boundary_scan_kernel,
            (problem.rows,),
            {
                "decay": decay, "local_stabilizer": local, "documents": documents,
                "initial_stabilizer": initial_stabilizer, "boundary": boundary, **sizes,
                "num_chunks": problem.num_chunks,
            },
            {"CHUNK": problem.chunk, "HAS_DOCUMENTS": problem.has_documents},
            num_warps=1,
        )
    )  # fmt: skip
    before = boundary[:, :-1].repeat_interleave(problem.chunk, dim=1)[:, : problem.sequence]
    carried = decay + before
    if document_starts is not None:
        last_before = torch.arange(problem.num_chunks, device=documents.device) * problem.chunk - 1
        first = documents[:, last_before.clamp(min=0)] * (last_before >= 0)
        first = first.repeat_interleave(problem.chunk, dim=1)[:, : problem.sequence]
        fresh = (documents != first).repeat_interleave(problem.heads, dim=0)
        carried = carried.masked_fill(fresh, -torch.inf)
    return Gates(log_input, decay, torch.maximum(carried, local), boundary, documents)


def compute_states(
    problem: Problem, key: Tensor, value: Tensor, gates: Gates, initial_matrix: Tensor,
    initial_normalizer: Tensor, launch: Executor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """C and n at every chunk boundary, fp32; slot 0 is the initial state and the last slot the final one."""
    slots = problem.num_chunks + 1
    states = gates.decay.new_empty(problem.rows, slots, problem.query_key_size, problem.value_size)
    normalizers = gates.decay.new_empty(problem.rows, slots, problem.query_key_size)
    states[:, 0].copy_(initial_matrix.flatten(0, 1))
    normalizers[:, 0].copy_(initial_normalizer.flatten(0, 1))
    entry = problem.configuration("state")
    launch(
        Launch(
            forward_kernels.state_kernel,
            (
                triton.cdiv(problem.query_key_size, entry.block_key),
                triton.cdiv(problem.value_size, entry.block_value),
                problem.rows,
            ),
            {
                "key": key, "value": value, "log_input": gates.log_input, **gates.arguments(),
                "states": states, "normalizers": normalizers,
                **strides_of("key", key), **strides_of("value", value),
                "sequence": problem.sequence, "heads": problem.heads, "num_chunks": problem.num_chunks,
            },
            problem.matrix_constants(entry), entry.num_warps, entry.num_stages,
        )
    )  # fmt: skip
    return states, normalizers


def compute_output(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, gates: Gates, states: Tensor,
    normalizers: Tensor, launch: Executor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs in the dtype of the values, and fp32 denominators n.q (batch * heads, sequence)."""
    output = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    denominator = torch.empty_like(gates.decay)
    entry = problem.configuration("output")
    launch(
        Launch(
            forward_kernels.output_kernel,
            (triton.cdiv(problem.value_size, entry.block_value), problem.num_tiles, problem.rows),
            {
                "query": query, "key": key, "value": value, "log_input": gates.log_input,
                "stabilizer": gates.stabilizer, **gates.arguments(), "states": states,
                "normalizers": normalizers, "output": output, "denominator": denominator,
                **strides_of("query", query), **strides_of("key", key), **strides_of("value", value),
                **strides_of("output", output), "sequence": problem.sequence, "heads": problem.heads,
                "num_chunks": problem.num_chunks, "scale": problem.scale, "epsilon": problem.epsilon,
            },
            problem.matrix_constants(entry), entry.num_warps, entry.num_stages,
        )
    )  # fmt: skip
    return output, denominator


@dataclass(frozen=True)
class OutputGradient:
    """The output's gradient and the per-token scalars derived from it, fp32 (batch * heads, sequence)."""

    output_gradient: Tensor  # (batch, sequence, heads, value_size)
    inverse_divisor: Tensor
    denominator_gradient: Tensor
    query_product: Tensor
    stabilizer_gradient: Tensor

    def arguments(self) -> dict[str, Tensor]:
        return {
            "output_gradient": self.output_gradient,
            "inverse_divisor": self.inverse_divisor,
        }


def compute_output_gradient(
    problem: Problem, output: Tensor, output_gradient: Tensor, denominator: Tensor, gates: Gates,
    launch: Executor,
) -> OutputGradient:  # fmt: skip
    """Take the gradient of the output through the division by the denominator."""
    result = OutputGradient(output_gradient, *(torch.empty_like(denominator) for _ in range(4)))
    tile = min(problem.tile, 16)
    launch(
        Launch(
            backward_kernels.output_gradient_kernel,
            (triton.cdiv(problem.sequence, tile), problem.rows),
            {
                "output": output, "denominator": denominator, "stabilizer": gates.stabilizer,
                **result.arguments(), "denominator_gradient": result.denominator_gradient,
                "query_product": result.query_product, "stabilizer_gradient": result.stabilizer_gradient,
                **strides_of("output", output), **strides_of("gradient", output_gradient),
                "sequence": problem.sequence, "heads": problem.heads, "epsilon": problem.epsilon,
            },
            {
                "VALUE_SIZE": problem.value_size, "TILE": tile,
                "BLOCK_VALUE": min(128, triton.next_power_of_2(problem.value_size)),
            },
        )
    )  # fmt: skip
    return result


def compute_state_gradients(
    problem: Problem, query: Tensor, gates: Gates, gradient: OutputGradient, states: Tensor,
    normalizers: Tensor, matrix_gradient: Tensor, normalizer_gradient: Tensor, launch: Executor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dC and dn at every chunk boundary, laid out as the states, and <C, dC> + <n, dn> there."""
    state_gradients, normalizer_gradients = torch.empty_like(states), torch.empty_like(normalizers)
    state_gradients[:, -1].copy_(matrix_gradient.flatten(0, 1))
    normalizer_gradients[:, -1].copy_(normalizer_gradient.flatten(0, 1))
    entry = problem.configuration("state_gradient")
    key_blocks = triton.cdiv(problem.query_key_size, entry.block_key)
    value_blocks = triton.cdiv(problem.value_size, entry.block_value)
    inner_products = states.new_empty(problem.rows, problem.num_chunks + 1, key_blocks * value_blocks)
    launch(
        Launch(
            backward_kernels.state_gradient_kernel,
            (key_blocks, value_blocks, problem.rows),
            {
                "query": query, "stabilizer": gates.stabilizer, **gates.arguments(), **gradient.arguments(),
                "denominator_gradient": gradient.denominator_gradient, "states": states,
                "normalizers": normalizers, "state_gradients": state_gradients,
                "normalizer_gradients": normalizer_gradients, "inner_products": inner_products,
                **strides_of("query", query), **strides_of("gradient", gradient.output_gradient),
                "sequence": problem.sequence, "heads": problem.heads, "num_chunks": problem.num_chunks,
                "scale": problem.scale,
            },
            problem.matrix_constants(entry), entry.num_warps, entry.num_stages,
        )
    )  # fmt: skip
    return state_gradients, normalizer_gradients, inner_products.sum(-1)


def compute_token_gradients(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, gates: Gates, gradient: OutputGradient,
    states: Tensor, normalizers: Tensor, state_gradients: Tensor, normalizer_gradients: Tensor,
    launch: Executor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv in the dtypes of q, k and v, and fp32 <k, dk> (batch * heads, sequence)."""
    query_gradient, key_gradient, value_gradient = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value)
    )
    common = {
        **gates.arguments(), "stabilizer": gates.stabilizer, "log_input": gates.log_input,
        **gradient.arguments(), **strides_of("gradient", gradient.output_gradient),
        "sequence": problem.sequence, "heads": problem.heads, "num_chunks": problem.num_chunks,
        "scale": problem.scale,
    }  # fmt: skip

    entry = problem.configuration("query_gradient")
    launch(
        Launch(
            token_kernels.query_gradient_kernel,
            (triton.cdiv(problem.query_key_size, entry.block_key), problem.num_tiles, problem.rows),
            {
                **common, "key": key, "value": value, "denominator_gradient": gradient.denominator_gradient,
                "states": states, "normalizers": normalizers, "query_gradient": query_gradient,
                **strides_of("key", key), **strides_of("value", value),
                **strides_of("result", query_gradient),
            },
            problem.matrix_constants(entry), entry.num_warps, entry.num_stages,
        )
    )  # fmt: skip

    entry = problem.configuration("key_gradient")
    key_blocks = triton.cdiv(problem.query_key_size, entry.block_key)
    key_products = gates.decay.new_empty(key_blocks, problem.rows, problem.sequence)
    launch(
        Launch(
            token_kernels.key_gradient_kernel,
            (key_blocks, problem.num_tiles, problem.rows),
            {
                **common, "query": query, "key": key, "value": value,
                "denominator_gradient": gradient.denominator_gradient, "state_gradients": state_gradients,
                "normalizer_gradients": normalizer_gradients, "key_gradient": key_gradient,
                "key_products": key_products, **strides_of("query", query), **strides_of("key", key),
                **strides_of("value", value), **strides_of("result", key_gradient),
            },
            problem.matrix_constants(entry), entry.num_warps, entry.num_stages,
        )
    )  # fmt: skip

    entry = problem.configuration("value_gradient")
    launch(
        Launch(
            token_kernels.value_gradient_kernel,
            (triton.cdiv(problem.value_size, entry.block_value), problem.num_tiles, problem.rows),
            {
                **common, "query": query, "key": key, "state_gradients": state_gradients,
                "value_gradient": value_gradient, **strides_of("query", query), **strides_of("key", key),
                **strides_of("result", value_gradient),
            },
            problem.matrix_constants(entry), entry.num_warps, entry.num_stages,
        )
    )  # fmt: skip
    return query_gradient, key_gradient, value_gradient, key_products.sum(0)


def compute_forget_gradient(
    problem: Problem, gates: Gates, token_products: Tensor, chunk_products: Tensor, launch: Executor
) -> Tensor:
    """The gradient of the log forget gates with the stabilizer held fixed, fp32 (batch * heads, sequence)."""
    result = torch.empty_like(gates.decay)
    launch(
        Launch(
            backward_kernels.forget_gradient_kernel,
            (problem.num_chunks, problem.rows),
            {
                "token_products": token_products, "chunk_products": chunk_products,
                "documents": gates.documents, "forget_gradient": result, "sequence": problem.sequence,
                "heads": problem.heads, "num_chunks": problem.num_chunks,
            },
            problem.scan_constants(),
        )
    )  # fmt: skip
    return result
