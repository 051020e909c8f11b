"""Every model that ships is as large as its file says: in its comment, in the plan, and in the model itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from pretrain.config import Config, load_config, parse_config
from pretrain.models.building import build_decoder
from pretrain.parallel.topology import build_topology, megatron_config
from pretrain.plan import plan
from tests.plan.conftest import CONFIGS, ONE_PROCESS

MODELS = {
    str(path.relative_to(CONFIGS / "models").with_suffix("")): path
    for path in sorted((CONFIGS / "models").rglob("*.yaml"))
}

# Counted from the released models, or from transformers' classes at their sizes.
PUBLISHED = {
    "xlstm/165m": 162_303_840,
    "xlstm/1.3b": 1_420_839_104,
    "xlstm/2.7b": 2_780_449_600,
    "xlstm/7b": 6_865_424_896,
    "mamba2/1.3b": 1_343_757_312,
    "mamba2/2.7b": 2_702_599_680,
    "mamba2/7b": 7_285_403_648,
    "nemotron_h/8b": 8_100_852_736,
    "bamba/9.8b": 9_778_138_240,
}


def _comment(path: Path) -> str:
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    return " ".join(line.removeprefix("#").strip() for line in lines)


def _config(path: Path) -> Config:
    """The model in a run on one process."""
    run = load_config(CONFIGS / "quickstart.yaml", ONE_PROCESS).model_dump(mode="json")
    sections = yaml.safe_load(path.read_text())
    if sections["model"].get("hierarchy", {}).get("type") == "hat":
        run["data"]["tokenizer"] = {"type": "hierarchical_bytes"}
    return parse_config({**run, **sections}, path.name)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_in_the_comment_the_plan_and_the_model(name: str) -> None:
    config = _config(MODELS[name])
    (stated,) = re.findall(r"([\d,]+) parameters", _comment(MODELS[name]))
    estimate = plan(config, 1)
    build_topology(config)
    with torch.device("meta"):
        model = build_decoder(config.model, megatron_config(config))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert int(stated.replace(",", "")) == estimate.parameters == estimate.stages[0].parameters == counted
    assert counted == PUBLISHED.get(name, counted)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("/tiny")])
def test_a_model_is_called_by_its_size(name: str) -> None:
    number, unit = re.fullmatch(r".*/([\d.]+)([mb])", name).groups()
    size = float(number) * {"m": 1e6, "b": 1e9}[unit]
    # Papers round, and some leave out the embedding: xLSTM[7:1] 125M has 164M with it, ParaGRU 1B has 1.31B.
    assert plan(_config(MODELS[name]), 1).parameters == pytest.approx(size, rel=0.35)


def test_published_sizes_ship() -> None:
    assert set(PUBLISHED) <= set(MODELS)
