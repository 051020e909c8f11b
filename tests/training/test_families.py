"""Every family that ships learns, and two hundred steps of its tiny model beat a bigram model on held-out bytes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from data.baseline import bigram_bits_per_byte
from data.dataset import open_data
from pretrain.config import Config, load_config
from pretrain.evaluate.command import evaluate_checkpoint
from pretrain.evaluate.held_out import held_out_indices
from pretrain.observe.metrics import read_metrics
from pretrain.train import Outcome, train

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = sorted(path.name for path in (CONFIGS / "models").iterdir())
# A matrix memory, a state-space model and chunks that are learned; the two hundred steps of others are slow tests.
LONG = ["hnet_1stage", "mamba2", "xlstm"]
# Mixers that solve their recurrence by Newton's method report how that went.
NEWTON = {"newton_residual", "newton_iterations", "newton_fallbacks"}
# Mixtures of experts report how tokens fall on experts.
ROUTED = {"moe_load", "moe_entropy", "moe_balance_loss", "moe_z_loss", "moe_dropped"}


def _config(family: str, directory: Path, *overrides: str) -> Config:
    fixed = [f"run.directory={directory}", "train.device=cpu", "parallel.data=1"]
    return load_config(CONFIGS / f"runs/{family}_tiny.yaml", [*fixed, *overrides])


@pytest.fixture(scope="module")
def bigram(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Bits per byte of a bigram model on the samples that the runs are evaluated on."""
    config = _config(FAMILIES[0], tmp_path_factory.mktemp("bigram"))
    data = open_data(config.data, config.train.seed)
    indices = held_out_indices(data.held_out, config.train.evaluate_samples)
    return bigram_bits_per_byte(data.train, data.held_out, held_out_indices=indices)


def _check_figures(family: str, config: Config, records: list[dict[str, Any]]) -> None:
    """What every step of a family reports, and of no family but those that it belongs to."""
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert not any(record["skipped"] for record in records)
    # Fresh weights know nothing: eight bits and a little more.
    assert records[0]["bits_per_byte"] == pytest.approx(8.0, abs=0.5)

    hierarchy = config.model.hierarchy
    stages = len(hierarchy.stages) if hierarchy is not None and hierarchy.type == "hnet" else 0
    for record in records:
        assert sum(name.startswith("ratio_loss") for name in record) == stages
    for stage in range(stages):
        # Chunks come to the size that is asked for from far away.
        target = hierarchy.stages[stage].target_ratio
        fractions = [record[f"boundary_fraction_{stage}"] for record in records]
        assert max(abs(1 / fraction - target) for fraction in fractions[:30]) > 0.5 * target
        assert all(record[f"bytes_per_chunk_{stage}"] > 0 for record in records)

    if hierarchy is not None and hierarchy.type == "hat":
        # Words of source code, with the spaces before them and the punctuation behind them.
        sizes = [record["bytes_per_word"] for record in records]
        assert min(sizes) > 2 and sum(sizes) / len(sizes) == pytest.approx(hierarchy.bytes_per_word, rel=0.1)

    channels = [block.channel for block in config.model.blocks.values() if block.channel]
    experts = max((channel.routed_experts() for channel in channels), default=0)
    for record in records:
        if not experts:
            assert not record.keys() & ROUTED
            continue
        assert record.keys() >= ROUTED
        assert record["moe_dropped"] == 0
        assert 1 <= record["moe_load"] <= experts
        # Of probabilities of so many experts at most, in nats.
        assert 0 < record["moe_entropy"] < math.log(experts) + 1e-3
    # Fresh routers choose among almost equal probabilities.
    assert not experts or records[0]["moe_balance_loss"] == pytest.approx(2, abs=0.1)

    for record in records:
        if not family.startswith("para_"):
            assert not record.keys() & NEWTON
            continue
        assert record.keys() >= NEWTON
        assert record["newton_fallbacks"] == 0
        # Rounding of states of order one.
        assert 0 <= record["newton_residual"] < 1e-5
        assert record["newton_iterations"] >= 3


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in LONG else pytest.mark.slow) for name in FAMILIES]
)
def test_two_hundred_steps_beat_a_bigram_model(family: str, bigram: float, tmp_path: Path) -> None:
    config = _config(family, tmp_path)
    assert train(config, "never") == Outcome(step=200, stopped_by_signal=False)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert len(records) == 200
    _check_figures(family, config, records)
    reached = records[-1]["held_out_bits_per_byte"]
    assert reached < bigram, f"{family} reaches {reached:.3f} bits per byte, a bigram model {bigram:.3f}"
    assert records[-1]["held_out_bits_per_byte"] < records[99]["held_out_bits_per_byte"]
    hierarchy = config.model.hierarchy
    if hierarchy is not None and hierarchy.type == "hnet":
        for stage, section in enumerate(hierarchy.stages):
            # Chunks stay at the size that is asked for.
            fractions = [record[f"boundary_fraction_{stage}"] for record in records]
            assert sum(fractions[-50:]) / 50 == pytest.approx(1 / section.target_ratio, rel=0.5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in LONG])
def test_every_family_begins_to_learn(family: str, tmp_path: Path) -> None:
    config = _config(family, tmp_path, "train.steps=50", "train.evaluate_every=25")
    train(config, "never")
    records = read_metrics(tmp_path / "metrics.jsonl")
    _check_figures(family, config, records)
    # Frequencies of single bytes alone give 4.9 bits.
    assert records[49]["held_out_bits_per_byte"] < records[24]["held_out_bits_per_byte"] < 4.8
    assert records[49]["held_out_bits_per_byte"] < 4.3
    hierarchy = config.model.hierarchy
    if hierarchy is not None and hierarchy.type == "hnet":
        for stage, section in enumerate(hierarchy.stages):
            # Chunks are on their way to the size that is asked for, after some that are far too large.
            fractions = [record[f"boundary_fraction_{stage}"] for record in records]
            assert sum(fractions[-10:]) / 10 == pytest.approx(1 / section.target_ratio, rel=0.5)


def test_runs_of_a_family_are_scored_on_the_bytes_of_the_baseline(bigram: float, tmp_path: Path) -> None:
    config = _config("mamba2", tmp_path)
    short = config.model_copy(update={"train": config.train.model_copy(update={"steps": 21})})
    train(short, "never")
    evaluation = evaluate_checkpoint(tmp_path, config.train.evaluate_samples)
    assert evaluation.bigram_bits_per_byte == bigram
    logged = read_metrics(tmp_path / "metrics.jsonl")[-1]["held_out_bits_per_byte"]
    assert evaluation.bits_per_byte == pytest.approx(logged, rel=1e-6)
