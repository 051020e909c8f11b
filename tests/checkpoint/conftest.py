"""Small checkpoints that the tests of the format share."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint import TensorPiece, write_checkpoint
from pretrain.checkpoint.format import KINDS, MANIFEST_FILE, manifest_checksum

_STATE = {
    "config": {"model": {"family": "mlstm", "hidden_size": 8}, "seed": 3},
    "samples_seen": 12800,
    "random": {"cpu": [1, 2, 3]},
    "learning_rate": 0.1 + 0.2,
}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Two parameters and a scalar, with distinct values everywhere."""
    return {
        "embedding.weight": torch.arange(48.0).reshape(8, 6),
        "blocks.0.norm.weight": torch.arange(100.0, 106.0),
        "blocks.0.decay": torch.tensor(7.25),
    }


def _whole_pieces(tensors: dict[str, Tensor], scale: float = 1.0) -> Iterator[TensorPiece]:
    """Every tensor whole, in all kinds; the moments are multiples of the weight so that a mix-up shows."""
    for name, tensor in tensors.items():
        for multiple, kind in enumerate(KINDS, start=1):
            yield TensorPiece(name, kind, tensor * multiple * scale, tuple(tensor.shape))


@pytest.fixture
def whole_pieces() -> Callable[..., Iterator[TensorPiece]]:
    return _whole_pieces


@pytest.fixture
def state() -> dict[str, Any]:
    return copy.deepcopy(_STATE)


@pytest.fixture
def run_checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def checkpoint(run_checkpoints: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """One checkpoint of step 100 with several shard files."""
    return write_checkpoint(run_checkpoints, 100, _whole_pieces(tensors), state, max_shard_bytes=256)


EditManifest = Callable[[Path, Callable[[dict[str, Any]], None]], None]


@pytest.fixture
def edit_manifest() -> EditManifest:
    """Change a manifest's body and renew its checksum, as an attacker or a faulty writer could."""

    def edit(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
        path = checkpoint / MANIFEST_FILE
        body = json.loads(path.read_text())
        change(body)
        body["checksum"] = manifest_checksum(body)
        path.write_text(json.dumps(body))

    return edit
