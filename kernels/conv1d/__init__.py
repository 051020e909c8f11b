"""The short causal convolution in front of many recurrent cells: each channel by itself, over the last few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.conv1d.blocks_torch import causal_conv1d_torch
from kernels.conv1d.reference import causal_conv1d_reference

__all__ = ["ACTIVATIONS", "BACKENDS", "causal_conv1d"]

BACKENDS = ("auto", "reference", "torch", "triton")
ACTIVATIONS = ("none", "silu")


def causal_conv1d(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    activation: str = "none",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution: ``y_t = activation(bias + sum_w weight[:, w] x_{t - width + 1 + w})``.

    Args:
        inputs: (batch, sequence, channels), any strides, any sequence length of at least 1.
        weight: (channels, width); its last column multiplies the token itself.
        bias: (channels,), or None.
        initial_state: (batch, width - 1, channels), the inputs before the first token; None: zeros.
        document_starts: (batch, sequence) bool, True at each document's first token, before which every input
            counts as zero.
        activation: ``"none"`` or ``"silu"``.
        backend: ``"reference"`` (loop over tokens), ``"torch"``, ``"triton"``, or ``"auto"``: Triton for CUDA tensors,
            torch otherwise and for float64.

    Returns:
        Outputs of the inputs' shape and dtype, and the state after the last token: the last ``width - 1`` inputs of
        the current document, zeros where it is shorter. Arithmetic and state are float32, or float64 if any of
        inputs, weight and initial state is.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an unknown backend or activation.
    """
    _check(inputs, weight, bias, initial_state, document_starts, activation)
    batch, _, channels = inputs.shape
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in (inputs, weight, initial_state))
    dtype = torch.float64 if is_double else torch.float32
    if initial_state is None:
        initial_state = inputs.new_zeros(batch, weight.shape[1] - 1, channels, dtype=dtype)
    if backend == "auto":
        backend = "triton" if inputs.is_cuda and not is_double else "torch"
    if backend == "reference":
        implementation = causal_conv1d_reference
    elif backend == "torch":
        implementation = causal_conv1d_torch
    elif backend == "triton":
        # Imported here because Triton is slow to import and absent from some CPU installations.
        from kernels.conv1d.tiles_triton import causal_conv1d_triton as implementation
    else:
        raise ValueError(f"causal_conv1d: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    return implementation(inputs, weight, bias, initial_state.to(dtype), document_starts, activation)


def _check(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    document_starts: Tensor | None,
    activation: str,
) -> None:
    if inputs.dim() != 3 or inputs.shape[1] < 1:
        raise ValueError(f"causal_conv1d: inputs must be (batch, sequence, channels), got {tuple(inputs.shape)}.")
    batch, sequence, channels = inputs.shape
    if not inputs.dtype.is_floating_point:
        raise ValueError(f"causal_conv1d: inputs must be floating point, got {inputs.dtype}.")
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"causal_conv1d: weight must be ({channels}, width), got {tuple(weight.shape)}.")
    expected = {
        "bias": (bias, (channels,)),
        "initial_state": (initial_state, (batch, weight.shape[1] - 1, channels)),
        "document_starts": (document_starts, (batch, sequence)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"causal_conv1d: {name} must be {shape}, got {tuple(tensor.shape)}.")
    if document_starts is not None and document_starts.dtype != torch.bool:
        raise ValueError(f"causal_conv1d: document_starts must be bool, got {document_starts.dtype}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
