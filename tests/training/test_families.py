"""Every family that ships learns: two hundred steps of its tiny model beat a bigram model on held-out bytes."""

from __future__ import annotations

import math
from pathlib import Path

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
# Made of mixers that other families train with; all their two hundred steps are among the slow tests.
COMBINED = ["bamba", "hnet_moe", "hybrid_moe", "jamba", "nemotron_h", "xlstm_attention", "xlstm_moe"]
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


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in COMBINED else ()) for name in FAMILIES]
)
def test_two_hundred_steps_beat_a_bigram_model(family: str, bigram: float, tmp_path: Path) -> None:
    config = _config(family, tmp_path)
    assert train(config, "never") == Outcome(step=200, stopped_by_signal=False)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 201))
    assert not any(record["skipped"] for record in records)
    reached = records[-1]["held_out_bits_per_byte"]
    assert reached < bigram, f"{family} reaches {reached:.3f} bits per byte, a bigram model {bigram:.3f}"
    # Fresh weights know nothing: eight bits and a little more.
    assert records[0]["bits_per_byte"] == pytest.approx(8.0, abs=0.5)
    assert records[-1]["held_out_bits_per_byte"] < records[99]["held_out_bits_per_byte"]

    hierarchy = config.model.hierarchy
    stages = len(hierarchy.stages) if hierarchy is not None and hierarchy.type == "hnet" else 0
    for record in records:
        assert sum(name.startswith("ratio_loss") for name in record) == stages
    for stage in range(stages):
        # Chunks come to the size that is asked for, from far away, and stay there.
        target = config.model.hierarchy.stages[stage].target_ratio
        fractions = [record[f"boundary_fraction_{stage}"] for record in records]
        assert max(abs(1 / fraction - target) for fraction in fractions[:30]) > 0.5 * target
        assert sum(fractions[-50:]) / 50 == pytest.approx(1 / target, rel=0.5)

    if hierarchy is not None and hierarchy.type == "hat":
        # Words of source code, with the spaces before them and the punctuation behind them.
        sizes = [record["bytes_per_word"] for record in records]
        assert min(sizes) > 2 and sum(sizes) / 200 == pytest.approx(hierarchy.bytes_per_word, rel=0.1)

    if family.endswith("moe"):
        for record in records:
            assert record.keys() >= ROUTED
            assert record["moe_dropped"] == 0
            assert 1 <= record["moe_load"] <= 8
            # Of probabilities of eight experts at most, in nats.
            assert 0 < record["moe_entropy"] <= 2.08
        # Fresh routers choose among almost equal probabilities.
        assert records[0]["moe_balance_loss"] == pytest.approx(2, abs=0.1)
    else:
        assert not any(record.keys() & ROUTED for record in records)

    if family.startswith("para_"):
        for record in records:
            assert record.keys() >= NEWTON
            assert record["newton_fallbacks"] == 0
            # Rounding of states of order one.
            assert 0 <= record["newton_residual"] < 1e-5
            assert record["newton_iterations"] >= 3
    else:
        assert not any(record.keys() & NEWTON for record in records)


@pytest.mark.parametrize("family", COMBINED)
def test_combined_families_begin_to_learn(family: str, tmp_path: Path) -> None:
    config = _config(family, tmp_path, "train.steps=50", "train.evaluate_every=25")
    train(config, "never")
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[0]["bits_per_byte"] == pytest.approx(8.0, abs=0.5)
    # Frequencies of single bytes alone give 4.9 bits.
    assert records[49]["held_out_bits_per_byte"] < records[24]["held_out_bits_per_byte"] < 4.8
    assert records[49]["held_out_bits_per_byte"] < 4.3
    experts = max(block.channel.routed_experts() for block in config.model.blocks.values() if block.channel)
    for record in records:
        assert not record["skipped"]
        assert {"ratio_loss_0", "bytes_per_chunk_0"} <= record.keys() or config.model.hierarchy is None
        if not experts:
            continue
        assert record.keys() >= ROUTED
        assert record["moe_dropped"] == 0 and 1 <= record["moe_load"] <= experts
        assert 0 < record["moe_entropy"] < math.log(experts) + 1e-3
    assert not experts or records[0]["moe_balance_loss"] == pytest.approx(2, abs=0.1)


def test_runs_of_a_family_are_scored_on_the_bytes_of_the_baseline(bigram: float, tmp_path: Path) -> None:
    config = _config("mamba2", tmp_path)
    short = config.model_copy(update={"train": config.train.model_copy(update={"steps": 21})})
    train(short, "never")
    evaluation = evaluate_checkpoint(tmp_path, config.train.evaluate_samples)
    assert evaluation.bigram_bits_per_byte == bigram
    logged = read_metrics(tmp_path / "metrics.jsonl")[-1]["held_out_bits_per_byte"]
    assert evaluation.bits_per_byte == pytest.approx(logged, rel=1e-6)
