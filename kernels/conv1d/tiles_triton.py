"""The causal convolution on a GPU: launches of the Triton kernels, and their autograd function.

Gradients of the weight are sums of partial sums in a fixed order, so that a run repeats exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.conv1d import triton_kernels as kernels
from kernels.conv1d.blocks_torch import empty_as
from kernels.launch import Executor, Launch, check_device, execute

# Tokens and channels of a tile; elements of 2 bytes are read 16 bytes at a time, rows of 128 bytes.
BLOCK_TOKENS, BLOCK_CHANNELS = 32, 64
# Tiles that one program adds up for the gradient of the weight.
TILES = 16


def tokens_since_start(document_starts: Tensor | None, width: int) -> Tensor | None:
    """``(batch, sequence)`` int32: tokens of the document before each; more than ``width`` where it began earlier."""
    if document_starts is None:
        return None
    position = torch.arange(document_starts.shape[1], device=document_starts.device)
    latest = torch.where(document_starts, position, -width - 1).cummax(1).values
    return (position - latest).int()


def final_window(inputs: Tensor, state: Tensor, since: Tensor | None) -> Tensor:
    """The last ``width - 1`` inputs of the current document, the state after the sequence."""
    reach, sequence = state.shape[1], inputs.shape[1]
    last = torch.cat([state[:, min(sequence, reach) :], inputs[:, max(sequence - reach, 0) :].to(state.dtype)], dim=1)
    if since is None:
        return last
    back = torch.arange(reach - 1, -1, -1, device=state.device)
    return last.masked_fill((back > since[:, -1:])[..., None], 0.0)


def _rows(tensor: Tensor) -> Tensor:
    """With contiguous channels, as the kernels read them."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_stride_batch": tensor.stride(0), f"{name}_stride_token": tensor.stride(1)}


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def conv1d_forward(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    since: Tensor | None,
    silu: bool,
    launch: Executor = execute,
) -> Tensor:
    """Outputs; ``weight`` is (width, channels) fp32, contiguous, as is ``state``."""
    batch, sequence, channels = inputs.shape
    outputs = empty_as(inputs)
    launch(
        Launch(
            kernel=kernels.conv1d_forward_kernel,
            grid=(_blocks(channels, BLOCK_CHANNELS), _blocks(sequence, BLOCK_TOKENS), batch),
            arguments={
                "inputs": inputs,
                "weight": weight,
                "bias": weight if bias is None else bias,
                "state": state,
                "since": weight if since is None else since,
                "outputs": outputs,
                **_strides("input", inputs),
                **_strides("output", outputs),
                "sequence": sequence,
                "channels": channels,
            },
            constants={
                "WIDTH": weight.shape[0],
                "HAS_BIAS": bias is not None,
                "HAS_DOCUMENTS": since is not None,
                "SILU": silu,
                "BLOCK_TOKENS": BLOCK_TOKENS,
                "BLOCK_CHANNELS": BLOCK_CHANNELS,
            },
        )
    )
    return outputs


def conv1d_backward(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    since: Tensor | None,
    output_gradient: Tensor,
    final_gradient: Tensor,
    silu: bool,
    launch: Executor = execute,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inputs, of weight (width, channels), of bias and of state, all but the first fp32."""
    batch, sequence, channels = inputs.shape
    width = weight.shape[0]
    token_blocks = _blocks(sequence, BLOCK_TOKENS * TILES)
    partial = weight.new_empty(batch, token_blocks, width + 1, channels)
    # Without an activation the sums are the outputs, and nothing is written here.
    sum_gradient = empty_as(inputs, torch.float32) if silu else output_gradient
    documents = weight if since is None else since
    sizes = {"BLOCK_TOKENS": BLOCK_TOKENS, "BLOCK_CHANNELS": BLOCK_CHANNELS}
    launch(
        Launch(
            kernel=kernels.conv1d_weight_gradient_kernel,
            grid=(_blocks(channels, BLOCK_CHANNELS), token_blocks, batch),
            arguments={
                "inputs": inputs,
                "weight": weight,
                "bias": weight if bias is None else bias,
                "state": state,
                "since": documents,
                "output_gradient": output_gradient,
                "sum_gradient": sum_gradient,
                "partial": partial,
                **_strides("input", inputs),
                **_strides("gradient", output_gradient),
                **_strides("sum", sum_gradient),
                "sequence": sequence,
                "channels": channels,
                "token_blocks": token_blocks,
            },
            constants={
                "WIDTH": width,
                "HAS_BIAS": bias is not None,
                "HAS_DOCUMENTS": since is not None,
                "SILU": silu,
                **sizes,
                "TILES": TILES,
                "ROWS": 1 << width.bit_length(),
            },
        )
    )
    input_gradient, state_gradient = empty_as(inputs), torch.empty_like(state)
    launch(
        Launch(
            kernel=kernels.conv1d_input_gradient_kernel,
            grid=(_blocks(channels, BLOCK_CHANNELS), _blocks(sequence + width - 1, BLOCK_TOKENS), batch),
            arguments={
                "gradient": sum_gradient,
                "weight": weight,
                "since": documents,
                "final_gradient": final_gradient,
                "input_gradient": input_gradient,
                "state_gradient": state_gradient,
                **_strides("gradient", sum_gradient),
                **_strides("input", input_gradient),
                "sequence": sequence,
                "channels": channels,
            },
            constants={"WIDTH": width, "HAS_DOCUMENTS": since is not None, **sizes},
        )
    )
    sums = partial.sum((0, 1))
    return input_gradient, sums[:width], sums[width], state_gradient


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
        since = tokens_since_start(document_starts, weight.shape[1])
        rows, state = _rows(inputs), initial_state.contiguous()
        outputs = conv1d_forward(rows, weight.float().mT.contiguous(), bias, state, since, activation == "silu")
        ctx.save_for_backward(rows, weight, bias, state, since)
        ctx.activation = activation
        return outputs, final_window(inputs, state, since)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor, final_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, state, since = ctx.saved_tensors
        of_inputs, of_weight, of_bias, of_state = conv1d_backward(
            inputs,
            weight.float().mT.contiguous(),
            bias,
            state,
            since,
            _rows(output_gradient),
            final_gradient.contiguous(),
            ctx.activation == "silu",
        )
        return (
            of_inputs,
            of_weight.mT.to(weight.dtype),
            None if bias is None else of_bias.to(bias.dtype),
            of_state,
            None,
            None,
        )


def causal_conv1d_triton(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    document_starts: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """As ``kernels.conv1d.causal_conv1d`` with the state given.

    Raises:
        ValueError: for float64, and for tensors on the CPU unless Triton's interpreter is active.
    """
    check_device(inputs, "causal_conv1d: inputs")
    if initial_state.dtype == torch.float64:
        raise ValueError("causal_conv1d: the Triton form computes in float32; use the torch form for float64.")
    return _CausalConvolution.apply(inputs, weight, bias, initial_state, document_starts, activation)
