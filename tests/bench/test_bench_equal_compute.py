"""``bench equal-compute``: every configuration does the same work, and what stands already is not done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain.bench.equal_compute import equal_compute, steps_for
from pretrain.cli import app
from pretrain.config import load_config
from pretrain.errors import InputError
from pretrain.observe.metrics import read_metrics
from pretrain.plan import model_flops_per_token

RUNS = Path(__file__).parents[2] / "configs" / "runs"
SMALL = ["data.sequence_length=32", "train.device=cpu", "train.evaluate_every=0", "parallel.data=1"]


def test_work_is_the_same_whatever_a_token_costs(tmp_path: Path) -> None:
    said: list[str] = []
    configs = [RUNS / "mamba2_tiny.yaml", RUNS / "hnet_1stage_tiny.yaml"]
    outcomes = equal_compute(configs, SMALL, 2e9, tmp_path, 8, said.append)
    assert [outcome.name for outcome in outcomes] == ["mamba2_tiny", "hnet_1stage_tiny"] and len(said) == 2
    flat, chunked = outcomes
    assert flat.tokens == 128 * flat.steps < chunked.tokens == 128 * chunked.steps
    # To the nearest step, and a hierarchy's first chunks are not of the size that was planned.
    assert flat.spent_flops == pytest.approx(2e9, rel=0.5 / flat.steps + 1e-6)
    assert chunked.spent_flops == pytest.approx(2e9, rel=0.5)
    assert all(outcome.bigram_bits_per_byte < outcome.bits_per_byte < 9 for outcome in outcomes)
    before = read_metrics(tmp_path / "mamba2_tiny" / "metrics.jsonl")
    assert equal_compute(configs[:1], SMALL, 2e9, tmp_path, 8, said.append) == outcomes[:1]
    assert read_metrics(tmp_path / "mamba2_tiny" / "metrics.jsonl") == before


def test_steps() -> None:
    config = load_config(RUNS / "mamba2_tiny.yaml", SMALL)
    step = model_flops_per_token(config) * config.train.global_batch_size * 32
    assert [steps_for(config, factor * step) for factor in (0.6, 1.4, 7.0)] == [1, 1, 7]
    with pytest.raises(InputError, match="less than a step"):
        steps_for(config, 0.4 * step)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two configurations have the same file name"):
        equal_compute([RUNS / "mamba2_tiny.yaml"] * 2, SMALL, 2e9, tmp_path, 8, print)
    with pytest.raises(InputError, match="no configuration is named"):
        CliRunner().invoke(app, ["bench", "equal-compute", "train.steps=3"], catch_exceptions=False)


def test_command_prints_json(tmp_path: Path) -> None:
    arguments = ["bench", "equal-compute", str(RUNS / "mamba2_tiny.yaml"), *SMALL, "--flops", "5e8", "--samples", "8"]
    ended = CliRunner().invoke(app, [*arguments, "--directory", str(tmp_path), "--json"], catch_exceptions=False)
    assert ended.exit_code == 0
    (row,) = json.loads(ended.stdout[ended.stdout.index("[\n") :])
    assert row["name"] == "mamba2_tiny" and row["steps"] == 2
