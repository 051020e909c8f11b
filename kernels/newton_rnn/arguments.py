"""The checks on arguments that all cells and all forms share, and the dtype of the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# State elements, over batch, components and channels, from which one token keeps a CPU core busy, so that a loop over
# tokens that records nothing for autograd beats three or more Newton steps. Measured; a GPU never gets there.
WIDE_STATE = 2048

BACKENDS = ("auto", "reference", "torch", "sequential", "triton")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of states and arithmetic: float64 if any of the tensors is float64, otherwise float32."""
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def check_arguments(
    name: str,
    inputs: Tensor,
    expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]],
    document_starts: Tensor | None,
    iterations: int,
    max_iterations: int,
    tolerance: float | None,
) -> None:
    """Raise ``ValueError`` for the first argument that does not fit.

    Args:
        name: of the function whose arguments these are.
        inputs: (batch, sequence, ..., channels), the tensor that fixes sizes and device.
        expected: tensors that may be None with the shapes that they must have, by argument name.
        document_starts, iterations, max_iterations, tolerance: as in ``newton_rnn``.
    """
    expected = dict(expected)
    if document_starts is not None:
        expected["document_starts"] = (document_starts, tuple(inputs.shape[:2]))
        if document_starts.dtype != torch.bool:
            raise ValueError(
                f"{name}: document_starts must be bool (True at each document's first token), "
                f"got {document_starts.dtype}."
            )
    for argument, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {argument} must have shape {shape}, got {tuple(tensor.shape)}.")
        if tensor.device != inputs.device:
            raise ValueError(f"{name}: {argument} is on {tensor.device} but the inputs are on {inputs.device}.")
    if not 1 <= iterations <= max_iterations:
        raise ValueError(
            f"{name}: needs 1 <= iterations <= max_iterations, got iterations {iterations} and "
            f"max_iterations {max_iterations}."
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"{name}: tolerance must be positive, got {tolerance}.")


def check_backend(name: str, backend: str, allowed: tuple[str, ...] = BACKENDS) -> None:
    """Raise ``ValueError`` for a backend that ``name`` does not have."""
    if backend not in allowed:
        raise ValueError(f"{name}: backend must be one of {', '.join(allowed)}, got {backend!r}.")


def choose_backend(backend: str, state_elements: int, is_cuda: bool, is_double: bool, has_kernel: bool) -> str:
    """The backend that "auto" stands for: what is fastest on the device."""
    if backend != "auto":
        return backend
    if is_cuda:
        return "triton" if has_kernel and not is_double else "torch"
    return "sequential" if state_elements >= WIDE_STATE else "torch"
