"""Checkpoints that any layout can read: keyed by global parameter names, safetensors and JSON only.

The names that need torch are loaded when first used, so that listing and inspecting checkpoints does not wait
for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.directory import (
    checkpoint_name,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    resolve_checkpoint,
)
from pretrain.checkpoint.format import CheckpointError

if TYPE_CHECKING:
    from pretrain.checkpoint.reader import CheckpointReader
    from pretrain.checkpoint.writer import TensorPiece, write_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "TensorPiece",
    "checkpoint_name",
    "list_checkpoints",
    "newest_checkpoint",
    "prune_checkpoints",
    "resolve_checkpoint",
    "write_checkpoint",
]

_NEED_TORCH = {
    "CheckpointReader": "pretrain.checkpoint.reader",
    "TensorPiece": "pretrain.checkpoint.writer",
    "write_checkpoint": "pretrain.checkpoint.writer",
}


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(import_module(_NEED_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
