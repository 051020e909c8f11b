"""A configuration loader and a one-process topology that the tests of plans share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.config import Config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def load() -> Callable[..., Config]:
    """Loads a file below ``configs/`` with overrides."""

    def load_file(name: str, *overrides: str) -> Config:
        return load_config(CONFIGS / name, overrides)

    return load_file
