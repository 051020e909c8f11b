"""``bench recall``: every configuration learns every task; what is known of mixers comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain.bench.recall import RecallOutcome, bench_recall
from pretrain.cli import app
from pretrain.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs" / "recall"
SMALL = ["model.hidden_size=16", "train.device=cpu"]


def test_command_trains_tests_and_writes(tmp_path: Path) -> None:
    files = [str(CONFIGS / f"{name}.yaml") for name in ("mlstm", "slstm")]
    options = ["--tasks", "parity, mqar", "--steps", "10", "--length", "32", "--samples", "16"]
    ended = CliRunner().invoke(
        app, ["bench", "recall", *files, *SMALL, *options, "--out", str(tmp_path / "out"), "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    outcomes = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert json.loads(ended.stdout[ended.stdout.index("[\n") :]) == outcomes
    assert [(row["model"], row["task"]) for row in outcomes] == [
        (model, task) for model in ("mlstm", "slstm") for task in ("parity", "mqar")
    ]
    for row in outcomes:
        assert row["mixers"] == [{"mlstm": "mlstm_pre_up", "slstm": "slstm"}[row["model"]]] and row["steps"] == 10
        assert list(row["accuracy"]) == list(row["chance"]) == ["32", "64", "128"]
        assert all(0 <= accuracy["share"] <= 1 for accuracy in row["accuracy"].values())
    parity, mqar = outcomes[:2]
    assert [accuracy["answers"] for accuracy in parity["accuracy"].values()] == [16 * n for n in (32, 64, 128)]
    assert [accuracy["answers"] for accuracy in mqar["accuracy"].values()] == [16 * 8] * 3
    text = (tmp_path / "out" / "recall.txt").read_text()
    assert "chance" in text and f"{parity['accuracy']['32']['share']:.3f}" in text
    assert (tmp_path / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    def say(text: str) -> None:
        raise AssertionError(f"trained: {text}")

    for configs, overrides, tasks, length, message in (
        (["slstm"] * 2, [], ["parity"], None, "two configurations have the same file name"),
        (["slstm"], [], ["parity", "mod33"], None, "no recall task 'mod33'"),
        (["slstm"], [], ["parity", "mqar"], 31, "mqar: sequences of 31 tokens are too short; give 32 or more"),
        (["slstm"], ["train.carry_state=true", "parallel.zero=1"], ["parity"], None, "train.carry_state to false"),
        (["../runs/hnet_1stage_tiny"], [], ["parity"], None, "model.hierarchy.type=hnet forms chunks or words"),
    ):
        with pytest.raises(InputError, match=message):
            bench_recall([CONFIGS / f"{name}.yaml" for name in configs], overrides, tasks, 2, length, 4, say)
    with pytest.raises(InputError, match="no configuration is named"):
        CliRunner().invoke(app, ["bench", "recall", "train.seed=1"], catch_exceptions=False)


def _accuracy(models: list[str], task: str, steps: int, length: int) -> dict[str, list[float]]:
    """Shares of right answers at the training length, twice and four times that."""
    files = [CONFIGS / f"{name}.yaml" for name in models]
    outcomes: list[RecallOutcome] = bench_recall(files, ["train.device=cpu"], [task], steps, length, 64, print)
    return {outcome.model: [accuracy.share for accuracy in outcome.accuracy.values()] for outcome in outcomes}


@pytest.mark.slow
def test_attention_and_mlstm_recall_pairs_and_a_small_linear_state_does_not() -> None:
    found = _accuracy(["attention", "mlstm", "mamba2", "mamba2_small_state"], "mqar", 400, 40)
    for model in ("attention", "mlstm", "mamba2"):
        assert min(found[model]) > 0.95
    assert max(found["mamba2_small_state"]) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("task", "steps"), [("parity", 400), ("mod3", 1200)])
def test_slstm_counts_beyond_the_training_length(task: str, steps: int) -> None:
    assert min(_accuracy(["slstm"], task, steps, 32)["slstm"]) > 0.95


@pytest.mark.slow
def test_linear_recurrences_and_attention_do_not_count_beyond_the_training_length() -> None:
    """Nor does ParaGRU, of which each channel feeds back into itself alone."""
    found = _accuracy(["mlstm", "mamba2", "attention", "para_gru"], "parity", 400, 40)
    assert all(shares[-1] < 0.75 for shares in found.values())
