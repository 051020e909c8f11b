"""Affine recurrences over a sequence, h_t = A_t h_{t-1} + b_t: a reference, a vectorised torch and a Triton form."""

from __future__ import annotations

from torch import Tensor

from kernels.affine_scan.arguments import check_arguments, compute_dtype
from kernels.affine_scan.reference import affine_scan_reference
from kernels.affine_scan.two_level_torch import affine_scan_two_level

__all__ = ["BACKENDS", "affine_scan"]

BACKENDS = ("auto", "reference", "torch", "triton")


def affine_scan(
    coefficients: Tensor,
    inputs: Tensor,
    *,
    initial: Tensor | None = None,
    document_starts: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """All states of h_t = A_t h_{t-1} + b_t, with exact gradients from one scan in the other direction.

    Affine maps compose associatively, (A', b') after (A, b) being (A' A, A' b + b') (Blelloch 1990, "Prefix
    sums and their applications", section 1.4). The gradient of a loss is itself an affine recurrence,
    l_t = dL/dh_t + A_{t+1}^T l_{t+1}, and gives dL/db_t = l_t and dL/dA_t = l_t h_{t-1}^T.

    Args:
        coefficients: A, (batch, sequence, channels) for one state component per channel, or
            (batch, sequence, K, K, channels) for K, with A[..., i, j, :] multiplying component j into i.
        inputs: b, (batch, sequence, channels) or (batch, sequence, K, channels). Any strides.
        initial: the state before the first token (after the last one if ``reverse``), (batch, channels) or
            (batch, K, channels); ``None`` is zero.
        document_starts: (batch, sequence) bool, True at each document's first token. Documents do not see each
            other: the state before a document's first token is zero, and with ``reverse`` the state after its
            last token is. ``None`` is one document that continues ``initial``.
        reverse: h_t = A_t h_{t+1} + b_t, from the last token to the first.
        backend: ``"reference"`` (loop over tokens), ``"torch"`` (two levels of loops over many tokens at once,
            any device), ``"triton"`` (on a GPU) or ``"auto"``: Triton for CUDA tensors, torch otherwise and for
            float64.

    Returns:
        The states, shaped as ``inputs`` and in its dtype. Arithmetic is float32, or float64 if any input is
        float64.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an unknown backend.
    """
    check_arguments(coefficients, inputs, initial, document_starts)
    if backend == "auto":
        is_double = compute_dtype(coefficients, inputs, initial).itemsize == 8
        backend = "triton" if inputs.is_cuda and not is_double else "torch"
    if coefficients.dim() == 5 and coefficients.shape[2] == 1:
        initial = None if initial is None else initial[:, 0]
        states = affine_scan(
            coefficients[:, :, 0, 0], inputs[:, :, 0],
            initial=initial, document_starts=document_starts, reverse=reverse, backend=backend,
        )  # fmt: skip
        return states.unsqueeze(2)
    if backend == "reference":
        implementation = affine_scan_reference
    elif backend == "torch":
        implementation = affine_scan_two_level
    elif backend == "triton":
        # Imported here because Triton is slow to import and absent from some CPU installations.
        from kernels.affine_scan.triton_launches import affine_scan_triton as implementation
    else:
        raise ValueError(f"affine_scan: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    return implementation(coefficients, inputs, initial, document_starts, reverse)
