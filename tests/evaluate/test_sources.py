"""Held-out loss by source of a mixture: what each source alone gives, in the command and in every layout of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.evaluate.command import evaluate_checkpoint
from pretrain.observe.metrics import read_metrics
from tests.convert.checkpoints import write_run
from tests.runs import raw_config, write_corpus

LENGTH = 32


def _mixture(directory: Path) -> dict[str, object]:
    write_corpus(directory / "words", 40)
    (directory / "digits").mkdir(exist_ok=True)
    for number in range(50):
        (directory / "digits" / f"{number}.txt").write_text(" ".join(str(number * factor) for factor in range(60)))
    sources = {name: {"type": "text_files", "path": str(directory / name)} for name in ("words", "digits")}
    return {name: {"source": source, "weight": 1.0} for name, source in sources.items()}


def test_each_source_has_the_loss_that_it_has_alone(tmp_path: Path) -> None:
    mixture = _mixture(tmp_path)
    common = {"sequence_length": LENGTH, "held_out_fraction": 0.2}
    run, _ = write_run(tmp_path / "run", data={"source": None, "mixture": mixture, **common})
    together = evaluate_checkpoint(run, 10**6)
    assert list(together.sources) == ["digits", "words"]
    for name, loss in together.sources.items():
        alone_run, _ = write_run(tmp_path / name / "run", data={"source": mixture[name]["source"], **common})
        alone = evaluate_checkpoint(alone_run, 10**6)
        assert alone.sources == {} and loss.labels == alone.labels
        assert loss.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-5)
        assert loss.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-5)
        assert f"{name:6}  {loss.nats_per_token:.4f} nats per token" in together.to_text()
    assert together.labels == sum(loss.labels for loss in together.sources.values())
    few = evaluate_checkpoint(run, 1)
    assert few.sources["digits"].labels == few.labels and few.sources["words"].nats_per_token is None
    assert "words   no sample: ask for more with --samples" in few.to_text()


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}, {"context": 2}], ids=["data", "pipeline", "context"])
def test_a_run_logs_each_source_in_every_layout(worker_pools, tmp_path: Path, parallel: dict) -> None:
    data = {"source": None, "mixture": _mixture(tmp_path)}
    logged = []
    for processes, layout in ((1, {}), (2, parallel)):
        raw = raw_config(tmp_path / str(processes), data=data, parallel=layout, schedule={"warmup_steps": 0})
        raw["train"] |= {"steps": 1, "evaluate_every": 0, "evaluate_samples": 9, "checkpoint_every": 0}
        worker_pools(processes).run("tests.training.programs", "run_training", raw=raw)
        (record,) = read_metrics(tmp_path / str(processes) / "run" / "metrics.jsonl")
        logged.append({key: value for key, value in record.items() if key.startswith("held_out_")})
    keys = {f"held_out_{figure}{name}" for figure in ("loss", "bits_per_byte") for name in ("", "_digits", "_words")}
    assert set(logged[0]) == keys and logged[1] == pytest.approx(logged[0], rel=1e-4)
    assert logged[0]["held_out_loss_digits"] != logged[0]["held_out_loss_words"]
