"""What all forms of the affine scan share: the checks, the dtype of the arithmetic and where documents cut."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic: float64 if any of the tensors is float64, otherwise float32."""
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def check_arguments(
    coefficients: Tensor, inputs: Tensor, initial: Tensor | None, document_starts: Tensor | None
) -> None:
    """Raise ``ValueError`` for the first argument whose shape, dtype or device does not fit; see ``affine_scan``."""
    if inputs.dim() not in (3, 4) or 0 in inputs.shape:
        raise ValueError(
            "affine_scan: inputs must have shape (batch, sequence, channels) or (batch, sequence, components, "
            f"channels), none of them zero, got {tuple(inputs.shape)}."
        )
    batch, sequence, *state = inputs.shape
    shape = (batch, sequence, *state) if len(state) == 1 else (batch, sequence, state[0], *state)
    expected = {"coefficients": (coefficients, shape)}
    if initial is not None:
        expected["initial"] = (initial, (batch, *state))
    if document_starts is not None:
        expected["document_starts"] = (document_starts, (batch, sequence))
        if document_starts.dtype != torch.bool:
            raise ValueError(
                "affine_scan: document_starts must be bool (True at each document's first token), "
                f"got {document_starts.dtype}."
            )
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"affine_scan: {name} must have shape {shape}, got {tuple(tensor.shape)}.")
        if tensor.device != inputs.device:
            raise ValueError(f"affine_scan: {name} is on {tensor.device} but inputs is on {inputs.device}.")


def restarts(document_starts: Tensor | None, reverse: bool) -> Tensor | None:
    """(batch, sequence) bool: where the scan, in the direction it goes, forgets the state it carries.

    Going back, a document is entered at its last token: the one before the next document's first.
    """
    if document_starts is None or not reverse:
        return document_starts
    ends = torch.zeros_like(document_starts)
    ends[:, :-1] = document_starts[:, 1:]
    return ends
