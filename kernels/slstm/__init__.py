"""The sLSTM cell: one entry point, ``slstm``, over a reference, a torch and a Triton form, all sequential in time."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.slstm.reference import slstm_reference
from kernels.slstm.sequential_torch import slstm_sequential
from kernels.slstm.state import SLSTMState, check_inputs, compute_dtype, zero_state

__all__ = ["BACKENDS", "SLSTMState", "slstm", "zero_state"]

BACKENDS = ("auto", "reference", "torch", "triton")


def slstm(
    gates: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    *,
    initial_state: SLSTMState | None = None,
    document_starts: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SLSTMState]:
    """The sLSTM over a sequence (Beck et al. 2024, "xLSTM", arXiv:2405.04517, section 2.2), with exact gradients.

    Per head, with gates g of i, f, z, o and all products but ``R y`` elementwise::

        g_t = gates[t, g] + R_g y_{t-1} + bias_g
        m_t = max(i_t, logsigmoid(f_t) + m_{t-1})                              where n_{t-1} = 0: m_t = i_t
        c_t = exp(logsigmoid(f_t) + m_{t-1} - m_t) c_{t-1} + exp(i_t - m_t) tanh(z_t)
        n_t = exp(logsigmoid(f_t) + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t)
        y_t = sigmoid(o_t) c_t / n_t

    Where ``n_{t-1} = 0`` nothing is carried over from c, n and m.

    Args:
        gates: (batch, sequence, 4, heads, head_size), pre-activations from the input in the order i, f, z, o; any
            strides, any sequence length of at least 1; finite.
        recurrent: (4, heads, head_size, head_size), R of each gate and head, rows to columns of ``y_{t-1}``.
        bias: (4, heads, head_size).
        initial_state: the state before the first token; ``None`` is the zero state.
        document_starts: (batch, sequence) bool, True at each document's first token, before which the carried
            state becomes exactly zero. ``None`` and all-False continue the initial state.
        backend: ``"reference"`` (loop that autograd records), ``"torch"`` (loop with its own backward, any
            device), ``"triton"`` (a GPU) or ``"auto"``: Triton for CUDA tensors, torch otherwise and for float64.

    Returns:
        The hidden states y (batch, sequence, heads, head_size) in the dtype of ``gates``, and the state after the
        last token. Arithmetic and states are float32, or float64 if gates, recurrent or bias are.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an unknown backend.
    """
    check_inputs(gates, recurrent, bias, initial_state, document_starts)
    if backend == "auto":
        is_double = compute_dtype(gates, recurrent, bias) == torch.float64
        backend = "triton" if gates.is_cuda and not is_double else "torch"
    if backend == "reference":
        return slstm_reference(gates, recurrent, bias, initial_state, document_starts)
    if backend == "torch":
        implementation = slstm_sequential
    elif backend == "triton":
        # Imported here because Triton is slow to import and absent from some CPU installations.
        from kernels.slstm.sequential_triton import slstm_triton as implementation
    else:
        raise ValueError(f"slstm: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    return implementation(gates, recurrent, bias, initial_state=initial_state, document_starts=document_starts)
