"""The state-space recurrence of Mamba-2 (SSD): a reference, a chunkwise torch and a Triton form."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ssd.chunkwise_torch import ssd_chunkwise
from kernels.ssd.reference import ssd_reference

__all__ = ["BACKENDS", "ssd"]

BACKENDS = ("auto", "reference", "torch", "triton")


def ssd(
    values: Tensor,
    step_size: Tensor,
    decay_rate: Tensor,
    keys: Tensor,
    queries: Tensor,
    *,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Structured state-space duality (Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060), exact gradients.

    Per head, which reads the keys and queries of its group::

        H_t = exp(step_t rate) H_{t-1} + step_t x_t k_t^T
        y_t = H_t q_t + skip x_t

    (The paper calls values x, keys B, queries C, the step size Delta, the rate A and skip D.)

    Args:
        values: (batch, sequence, heads, head_size), any sequence length of at least 1.
        step_size: (batch, sequence, heads), above 0.
        decay_rate: (heads,), below 0.
        keys, queries: (batch, sequence, groups, state_size); head h uses group ``h * groups // heads``.
        skip: (heads,), or None.
        initial_state: (batch, heads, head_size, state_size), the state before the first token; None: zeros.
        document_starts: (batch, sequence) bool, True at each document's first token, before which the carried
            state becomes exactly zero. None and all-False continue the initial state.
        chunk_size: tokens computed together by the chunkwise forms; changes speed, not results. The Triton form takes
            the nearest that it has.
        backend: ``"reference"`` (loop over tokens), ``"torch"`` (chunkwise, any device), ``"triton"`` (chunkwise on a
            GPU) or ``"auto"``: Triton for CUDA tensors, torch otherwise and for float64.

    Returns:
        Outputs of the values' shape and dtype, and the state after the last token. Arithmetic and state are float32,
        or float64 if any input is float64.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an unknown backend.
    """
    _check(values, step_size, decay_rate, keys, queries, skip, initial_state, document_starts, chunk_size)
    batch, sequence, heads, head_size = values.shape
    tensors = (values, step_size, decay_rate, keys, queries, skip, initial_state)
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if is_double else torch.float32
    if initial_state is None:
        initial_state = values.new_zeros(batch, heads, head_size, keys.shape[3], dtype=dtype)
    if backend == "auto":
        backend = "triton" if values.is_cuda and not is_double else "torch"
    inputs = (values, step_size, decay_rate, keys, queries, skip, initial_state.to(dtype), document_starts)
    # For one decoded token a step of the loop costs less than the chunkwise form's set-up.
    is_decoding = sequence == 1 and not torch.is_grad_enabled()
    if backend == "reference" or (backend == "torch" and is_decoding):
        return ssd_reference(*inputs)
    if backend == "torch":
        return ssd_chunkwise(*inputs, chunk_size)
    if backend == "triton":
        # Imported here because Triton is slow to import and absent from some CPU installations.
        from kernels.ssd.chunkwise_triton import ssd_triton

        return ssd_triton(*inputs, chunk_size)
    raise ValueError(f"ssd: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")


def _check(
    values: Tensor,
    step_size: Tensor,
    decay_rate: Tensor,
    keys: Tensor,
    queries: Tensor,
    skip: Tensor | None,
    initial_state: Tensor | None,
    document_starts: Tensor | None,
    chunk_size: int,
) -> None:
    if values.dim() != 4 or values.shape[1] < 1:
        raise ValueError(f"ssd: values must be (batch, sequence, heads, head_size), got {tuple(values.shape)}.")
    if keys.dim() != 4:
        raise ValueError(f"ssd: keys must be (batch, sequence, groups, state_size), got {tuple(keys.shape)}.")
    batch, sequence, heads, head_size = values.shape
    groups, state_size = keys.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"ssd: {heads} heads cannot share the keys of {groups} groups evenly.")
    expected = {
        "step_size": (step_size, (batch, sequence, heads)),
        "decay_rate": (decay_rate, (heads,)),
        "keys": (keys, (batch, sequence, groups, state_size)),
        "queries": (queries, (batch, sequence, groups, state_size)),
        "skip": (skip, (heads,)),
        "initial_state": (initial_state, (batch, heads, head_size, state_size)),
        "document_starts": (document_starts, (batch, sequence)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"ssd: {name} must be {shape}, got {tuple(tensor.shape)}.")
    if document_starts is not None and document_starts.dtype != torch.bool:
        raise ValueError(f"ssd: document_starts must be bool, got {document_starts.dtype}.")
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size must be at least 1, got {chunk_size}.")
