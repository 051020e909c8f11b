"""A configuration loader and a one-process topology that the tests of plans share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.config import Config, load_config

# Figures in these tests are worked out for this batch, whatever the quickstart's own is.
BATCH = ("train.global_batch_size=16", "train.micro_batch_size=8")
ONE_PROCESS = ("train.device=cpu", "parallel.tensor=1", "parallel.sequence=false", "parallel.zero=0")
CONFIGS = Path(__file__).parents[2] / "configs"
EVERY_FAMILY = sorted(path.name for path in (CONFIGS / "models").iterdir())
# How many positions their layers have depends on what they read; test_hierarchies.py is about them.
HIERARCHIES = [name for name in EVERY_FAMILY if "hierarchy" in (CONFIGS / f"models/{name}/tiny.yaml").read_text()]
FAMILIES = [name for name in EVERY_FAMILY if name not in HIERARCHIES]


@pytest.fixture
def load() -> Callable[..., Config]:
    """Loads a file below ``configs/`` with overrides."""

    def load_file(name: str, *overrides: str) -> Config:
        batch = BATCH if name == "quickstart.yaml" else ()
        return load_config(CONFIGS / name, (*batch, *overrides))

    return load_file
