"""``bench checkpoint`` inside a pool of workers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch


def measure(raw: dict[str, Any], rounds: int, directory: str) -> list[dict[str, Any]]:
    """What this rank measured."""
    from pretrain.bench.checkpoint_rank import measure_on_this_rank

    return [asdict(row) for row in measure_on_this_rank(raw, rounds, Path(directory), lambda text: None)]


def measure_a_save_that_comes_too_late(raw: dict[str, Any], directory: str) -> str:
    """The error where one way saves weights that are not those of the call."""
    from pretrain.bench.checkpoint_contestants import TorchSave
    from pretrain.errors import CheckError

    original = TorchSave._state_dict

    def later(self: TorchSave) -> dict[str, torch.Tensor]:
        return {name: tensor + 1e-3 for name, tensor in original(self).items()}

    TorchSave._state_dict = later
    try:
        measure(raw, 1, directory)
    except CheckError as error:
        return str(error)
    finally:
        TorchSave._state_dict = original
    raise AssertionError("it was not noticed")
