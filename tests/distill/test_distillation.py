"""From a teacher to a student that was trained with it: by our own functions, and by the configurations that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from data.dataset import open_data
from pretrain.checkpoint import CheckpointReader, resolve_checkpoint
from pretrain.cli import app
from pretrain.config import load_config
from pretrain.distill.divergence import divergence
from pretrain.distill.ranking import rank_layers
from pretrain.errors import InputError
from pretrain.generate import generate_text
from pretrain.models.decoder import IGNORED_LABEL
from pretrain.models.loading import load_decoder
from pretrain.parallel.schedule import BatchLoss
from pretrain.plan import plan
from tests.convert.checkpoints import write_run
from tests.distill.models import attention_model, write_student
from tests.runs import pretrain, raw_config, write_corpus
from tests.training.programs import run_training

CONFIGS = Path(__file__).parents[2] / "configs"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(resolve_checkpoint(path)) as reader:
        return {name: reader.read(name) for name in reader.names()}


def test_a_run_learns_from_its_teacher_and_later_in_every_layer(tmp_path: Path) -> None:
    teacher, student = write_student(tmp_path)
    write_corpus(tmp_path / "corpus")
    raw = raw_config(tmp_path) | {"parallel": {"zero": 0}}
    begin = yaml.safe_load((student / "config.yaml").read_text())
    raw |= {"model": begin["model"], "distillation": {"teacher": str(teacher), "train_only": "replaced"}}
    raw["train"] |= {"steps": 8, "evaluate_every": 0, "checkpoint_every": 0}
    raw["optimizer"]["learning_rate"] = 1e-2
    assert run_training(raw, str(student)) == (8, False)
    lines = metrics(tmp_path / "run")
    found = [line["distillation/divergence"] for line in lines]
    assert found[-1] < 0.9 * found[0]
    for line in lines:
        assert line["distillation/loss"] == pytest.approx(line["distillation/divergence"])
        # What is logged as the loss is that of the text's own next bytes.
        assert line["loss"] > 3.0
    before, after = weights(student), weights(tmp_path / "run")
    trained = ("layers.1.mixer.", "layers.1.mixer_norm.")
    assert {name for name in after if not torch.equal(before[name], after[name])} == {
        name for name in after if name.startswith(trained)
    }
    with CheckpointReader(resolve_checkpoint(tmp_path / "run")) as reader:
        assert all(name.startswith(trained) for name in reader.names("exp_avg"))

    # All layers go on from there, those that were fixed with fresh moments.
    raw["distillation"]["train_only"] = "everything"
    raw["train"]["steps"] = 10
    raw["observe"] = {"samples": {"every": 10, "prompts": ["the state"], "temperature": 0, "max_new_tokens": 8}}
    assert run_training(raw) == (10, False)
    (written,) = map(json.loads, (tmp_path / "run" / "samples.jsonl").read_text().splitlines())
    assert [written["text"]] == generate_text(tmp_path / "run", ["the state"], 8, temperature=0, device="cpu")
    last = weights(tmp_path / "run")
    assert all(not torch.equal(after[name], last[name]) for name in last)
    assert metrics(tmp_path / "run")[-1]["distillation/divergence"] < found[0]


def test_layers_are_ranked_by_what_leaving_them_out_costs(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    raw = raw_config(tmp_path)
    model = attention_model()
    teacher, decoder = write_run(tmp_path / "teacher", model, data=raw["data"], train=raw["train"])
    ranking = rank_layers(teacher, 6)
    assert ranking.nats_per_token == pytest.approx(_loss_without(teacher, None, 6).nats_per_token, rel=1e-5)
    assert sorted(row.layer for row in ranking.layers) == [0, 1, 2]
    assert [row.divergence for row in ranking.layers] == sorted(row.divergence for row in ranking.layers)
    for row in ranking.layers:
        without = _loss_without(teacher, row.layer, 6).nats_per_token
        assert row.loss_rise == pytest.approx(without - ranking.nats_per_token, abs=1e-5)
        assert row.divergence > 0.01
    result = CliRunner().invoke(app, ["rank-layers", str(teacher), "--samples", "2", "--json"])
    assert len(json.loads(result.output)["layers"]) == 3
    assert "the least important first" in ranking.to_text()
    recurrent, _ = write_run(tmp_path / "recurrent", data=raw["data"])
    with pytest.raises(InputError, match="has no attention layers, so there is nothing to rank"):
        rank_layers(recurrent, 1)


def _loss_without(path: Path, layer: int | None, samples: int) -> BatchLoss:
    """Held-out loss of the model with the output of one layer's attention set to zero."""
    from pretrain.evaluate.held_out import evaluate_held_out

    loaded = load_decoder(path)
    if layer is not None:
        # Attention adds nothing where it is projected to zeros.
        loaded.decoder.layers[str(layer)].mixer.output.weight.zero_()
    data = open_data(loaded.config.data, loaded.config.train.seed)
    decoder = loaded.decoder
    return evaluate_held_out(decoder, decoder, data.held_out, samples, 2, loaded.topology).whole


def test_a_plan_says_that_a_teacher_is_not_counted_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(CONFIGS / "runs/distill_tiny.yaml")
    assert plan(config).uncounted_teacher == "runs/attention_tiny"
    result = CliRunner().invoke(app, ["plan", str(CONFIGS / "runs/distill_tiny.yaml")])
    assert "Not counted: the teacher runs/attention_tiny" in " ".join(result.output.split())


@torch.no_grad()
def divergence_from(teacher: Path, student: Path) -> float:
    """KL(teacher || student) on held-out text, nats per token."""
    logits = []
    for path in (teacher, student):
        loaded = load_decoder(path)
        batch = open_data(loaded.config.data, loaded.config.train.seed).held_out.batch(list(range(0, 256, 4)))
        logits.append(loaded.decoder.logits(batch.tokens, document_starts=batch.document_starts)[0])
    counts = batch.labels != IGNORED_LABEL
    return divergence(logits[1], logits[0])[counts].mean().item()


@pytest.mark.slow
def test_the_configurations_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs, source = tmp_path / "runs", CONFIGS / "runs"

    def run(*arguments: object) -> str:
        done = pretrain(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("train", source / "attention_tiny.yaml", "train.device=cpu")
    ranking = json.loads(run("rank-layers", "runs/attention_tiny", "--json"))
    least = sorted(row["layer"] for row in ranking["layers"][:2])
    assert least == [1, 2], "the configuration replaces the least important layers"
    run("replace-layers", "runs/attention_tiny", "runs/distill_tiny_begin", "--layers", "1,2")
    begin = ["train.device=cpu", "--resume", "runs/distill_tiny_begin"]
    run("train", source / "distill_tiny.yaml", *begin)
    alone = ["distillation=null", "run.directory=runs/without_teacher"]
    run("train", source / "distill_tiny.yaml", *alone, *begin)

    names = ["distill_tiny_begin", "distill_tiny", "without_teacher"]
    begun, distilled, without = (divergence_from(runs / "attention_tiny", runs / name) for name in names)
    print(f"from the teacher: begun {begun:.5f}, with it {distilled:.5f}, without it {without:.5f}")
    assert distilled < 0.5 * begun
    assert distilled < 0.5 * without
    losses = {name: metrics(runs / name)[-1]["held_out_loss"] for name in ("attention_tiny", *names[1:])}
    print(f"held-out losses: {losses}")
    teacher = losses["attention_tiny"]
    assert abs(losses["distill_tiny"] - teacher) < abs(losses["without_teacher"] - teacher)
    run("export", "runs/distill_tiny", "exported")
