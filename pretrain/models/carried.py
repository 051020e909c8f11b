"""Tensors that flow from layer to layer beside the hidden states, also from one pipeline stage to the next.

Megatron-core's schedules pass a single tensor between stages. What is carried goes behind the hidden states' channels,
bit by bit: it stays float32 where hidden states are bfloat16, and so do its gradients on their way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.models.mixer import Carried, Documents
from pretrain.models.mixer_config import SEQUENCE_LENGTHS


def initial_carried(hidden: Tensor, channels: Mapping[str, int], documents: Documents | None = None) -> Carried:
    """What the first layer finds: zeros for the positions of ``hidden``, ``(sequence, batch, channels)`` float32.

    Where ``documents`` says that a row holds several sequences, how long they are is handed on beside them.
    """
    shape = hidden.shape[:2]
    carried = {
        # Leaves that take a gradient: the first layer's backward pass so is every layer's.
        name: torch.zeros(*shape, size, device=hidden.device, requires_grad=torch.is_grad_enabled())
        for name, size in channels.items()
    }
    if carried and documents is not None and documents.sequence_lengths is not None:
        carried[SEQUENCE_LENGTHS] = documents.sequence_lengths
    return carried


def packed_channels(channels: Mapping[str, int], dtype: torch.dtype) -> int:
    """How many channels of ``dtype`` hold what is carried."""
    return sum(channels.values()) * torch.float32.itemsize // dtype.itemsize


def _join(hidden: Tensor, carried: Tensor) -> Tensor:
    return torch.cat([hidden, carried.contiguous().view(hidden.dtype)], dim=-1)


def _split(packed: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    hidden, bits = packed.split([hidden_size, packed.shape[-1] - hidden_size], dim=-1)
    return hidden.contiguous(), bits.contiguous().view(torch.float32)


class _Pack(torch.autograd.Function):
    """Hidden states and float32 tensors as one tensor of the hidden states' dtype; gradients come back packed alike."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, carried: Tensor) -> Tensor:
        ctx.hidden_size = hidden.shape[-1]
        return _join(hidden, carried)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return _split(gradient, ctx.hidden_size)


class _Unpack(torch.autograd.Function):
    """The reverse of :class:`_Pack`; one function, so that no gradient's bits are ever added to others."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
        return _split(packed, hidden_size)

    @staticmethod
    def backward(ctx: Any, hidden: Tensor, carried: Tensor) -> tuple[Tensor, None]:
        return _join(hidden, carried), None


def pack(hidden: Tensor, carried: Carried) -> Tensor:
    """One tensor for the next pipeline stage: ``(sequence, batch, hidden_size + packed_channels)``."""
    return _Pack.apply(hidden, torch.cat(list(carried.values()), dim=-1)) if carried else hidden


def unpack(packed: Tensor, channels: Mapping[str, int]) -> tuple[Tensor, Carried]:
    """What :func:`pack` was given on the stage before; ``channels`` in the same order."""
    if not channels:
        return packed, {}
    hidden_size = packed.shape[-1] - packed_channels(channels, packed.dtype)
    hidden, carried = _Unpack.apply(packed, hidden_size)
    return hidden, dict(zip(channels, carried.split(list(channels.values()), dim=-1), strict=True))


class _WithAuxiliaryLoss(torch.autograd.Function):
    """Is the first loss, and has the gradient of the sum of both."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, auxiliary: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


def with_auxiliary_loss(loss: Tensor, auxiliary: Tensor) -> Tensor:
    """A scalar that reads as ``loss`` and trains as ``loss + auxiliary``.

    So what is logged as cross-entropy is cross-entropy, and both are divided by the same number of labels, which only
    the caller of the model knows. Under sequence parallelism each rank adds the auxiliary loss of its own positions,
    whose gradients reach its own positions.
    """
    return _WithAuxiliaryLoss.apply(loss, auxiliary)
