"""The mLSTM cell: one entry point, ``mlstm``, over a reference, a vectorised torch and a Triton form."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.mlstm.chunkwise_torch import mlstm_chunkwise
from kernels.mlstm.reference import mlstm_reference
from kernels.mlstm.state import MLSTMState, check_inputs, compute_dtype, zero_state

__all__ = ["BACKENDS", "MLSTMState", "mlstm", "zero_state"]

BACKENDS = ("auto", "reference", "torch", "triton")


def nearest_triton_chunk(chunk_size: int) -> int:
    """The largest chunk of the Triton form that is not above ``chunk_size``: a power of two from 16 to 512."""
    return min(512, max(16, 1 << (chunk_size.bit_length() - 1)))


def mlstm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    initial_state: MLSTMState | None = None,
    document_starts: Tensor | None = None,
    chunk_size: int = 64,
    epsilon: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """The mLSTM over a sequence (Beck et al. 2024, "xLSTM", arXiv:2405.04517), with exact gradients.

    Per head, with ``l = logsigmoid(forget_gate)``, ``i = input_gate`` and the query scaled by
    ``query_key_size ** -0.5``::

        m_t = max(l_t + m_{t-1}, i_t)
        C_t = exp(l_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T
        n_t = exp(l_t + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t) k_t
        h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + epsilon)

    Args:
        query, key: (batch, sequence, heads, query_key_size), any strides, any sequence length of at least 1.
        value: (batch, sequence, heads, value_size).
        input_gate, forget_gate: (batch, sequence, heads), pre-activations after any soft cap; finite.
        initial_state: the state before the first token; ``None`` is the zero state.
        document_starts: (batch, sequence) bool, True at each document's first token, before which the carried
            state becomes exactly zero. ``None`` and all-False continue the initial state.
        chunk_size: tokens computed together by the chunkwise forms; changes speed, not results. The Triton
            form takes the nearest that it has.
        epsilon: added to the denominator.
        backend: ``"reference"`` (loop over tokens), ``"torch"`` (chunkwise, any device), ``"triton"``
            (chunkwise on a GPU) or ``"auto"``: Triton for CUDA tensors, torch otherwise and for float64.

    Returns:
        The hidden states (batch, sequence, heads, value_size) in the dtype of ``value``, and the state after
        the last token. Arithmetic and states are float32, or float64 if any input is float64.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or an unknown backend.
    """
    check_inputs(query, key, value, input_gate, forget_gate, initial_state, document_starts, chunk_size)
    if backend == "auto":
        is_double = compute_dtype(query, key, value, input_gate, forget_gate).itemsize == 8
        backend = "triton" if query.is_cuda and not is_double else "torch"
    # For one decoded token a step of the loop costs a quarter of the chunkwise form's set-up.
    is_decoding = query.shape[1] == 1 and not torch.is_grad_enabled()
    if backend == "reference" or (backend == "torch" and is_decoding):
        return mlstm_reference(query, key, value, input_gate, forget_gate, initial_state, document_starts, epsilon)
    if backend == "torch":
        implementation = mlstm_chunkwise
    elif backend == "triton":
        # Imported here because Triton is slow to import and absent from some CPU installations.
        from kernels.mlstm.chunkwise_triton import mlstm_triton as implementation

        chunk_size = nearest_triton_chunk(chunk_size)
    else:
        raise ValueError(f"mlstm: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    return implementation(
        query,
        key,
        value,
        input_gate,
        forget_gate,
        initial_state=initial_state,
        document_starts=document_starts,
        chunk_size=chunk_size,
        epsilon=epsilon,
    )
