"""Fixtures of the tests of imports."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.convert.native_models import random_model
from tests.runs import raw_config


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved(name)``: a directory that ``transformers`` wrote, in several files."""
    directory = tmp_path_factory.mktemp("saved")

    def save(name: str) -> Path:
        path = directory / name.replace(", ", "_")
        if not path.exists():
            random_model(name).save_pretrained(path, max_shard_size="20KB")
            assert (path / "model.safetensors.index.json").exists()
        return path

    return save


@pytest.fixture
def copied(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same, to be damaged."""
    return lambda name: Path(shutil.copytree(saved(name), tmp_path / "hf"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """All that a directory of weights cannot say."""
    raw = raw_config(tmp_path)
    del raw["model"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "base.yaml"
