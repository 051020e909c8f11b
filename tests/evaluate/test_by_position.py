"""Loss by position and on long rows: against whole passes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data.batch import IGNORED_LABEL
from data.dataset import open_data
from pretrain.cli import app
from pretrain.errors import InputError
from pretrain.evaluate import by_position
from pretrain.evaluate.by_position import check_lengths, evaluate_by_position, label_losses, parse_lengths
from pretrain.evaluate.command import evaluate_checkpoint
from pretrain.evaluate.held_out import held_out_indices
from pretrain.models.loading import load_decoder
from tests.configurations import TINY_MODEL, tiny_config
from tests.convert.checkpoints import model_section, random_decoder, write_run
from tests.models.hat_models import hat_model
from tests.models.hnet_models import hnet_model
from tests.runs import write_corpus

ATTENTION = {"type": "attention", "num_heads": 4, "num_key_value_heads": 2}
HYBRID = {
    "layers": ["mlstm", "attention", "window"],
    "num_layers": 3,
    "blocks": {
        **TINY_MODEL["blocks"],
        "attention": {"mixer": ATTENTION},
        "window": {"mixer": ATTENTION | {"sliding_window": 9}},
    },
}
LENGTH = 32


def _run(directory: Path, model: dict[str, Any] | None = None) -> Path:
    write_corpus(directory / "corpus")
    source = {"type": "text_files", "path": str(directory / "corpus"), "pattern": "*.txt"}
    data = {"source": source, "sequence_length": LENGTH, "held_out_fraction": 0.2}
    return write_run(directory / "run", model=model, data=data)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("positions"))


@pytest.mark.parametrize("model", [{}, HYBRID, hnet_model(1)], ids=["recurrent", "hybrid", "hierarchy"])
def test_segments_give_what_one_pass_gives(model: dict, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder(tiny_config(model=model_section(**model)))
    loaded = load_decoder(run)
    samples = open_data(loaded.config.data, 0).held_out.with_length(40)
    batch = samples.batch(range(40))
    assert batch.document_starts[:, 1:].any() and not batch.document_starts[:, 1:].all()
    whole = label_losses(decoder, batch)
    monkeypatch.setattr(by_position, "SEGMENT", 11)
    torch.testing.assert_close(label_losses(decoder, batch), whole, rtol=1e-4, atol=1e-4)
    assert whole.std() > 0.1 and (whole[batch.labels == IGNORED_LABEL] == 0).all()


def test_buckets_and_what_lies_beyond_training_are_those_of_plain_sums(run: Path) -> None:
    loaded = load_decoder(run)
    data = open_data(loaded.config.data, 0)
    short, long = evaluate_by_position(loaded, data.held_out, [LENGTH, 4 * LENGTH], 6 * 4 * LENGTH)
    assert short.beyond is None and short.buckets[-1].last == LENGTH - 1
    samples = data.held_out.with_length(4 * LENGTH)
    nats: dict[int, list[float]] = {}
    beyond, anew = [], []
    # Few, or differences of a random model average out.
    for index in held_out_indices(samples, 6):
        batch = samples.batch([index])
        losses = _plain_losses(loaded.decoder, batch.tokens, batch.labels, batch.document_starts)[0]
        cut = batch.cut(LENGTH)
        restarted = _plain_losses(loaded.decoder, cut.tokens, cut.labels, cut.document_starts).reshape(-1)
        position = -1
        for place, (start, label) in enumerate(zip(batch.document_starts[0], batch.labels[0], strict=True)):
            position = 0 if start else position + 1
            if label == IGNORED_LABEL:
                continue
            nats.setdefault(position.bit_length(), []).append(float(losses[place]))
            if position >= LENGTH:
                beyond.append(float(losses[place]))
                anew.append(float(restarted[place]))
    assert [bucket.first for bucket in long.buckets] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert [bucket.last for bucket in long.buckets] == [0, 1, 3, 7, 15, 31, 63, 127]
    for bucket, (_, values) in zip(long.buckets, sorted(nats.items()), strict=True):
        assert bucket.labels == len(values)
        assert bucket.nats_per_token == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert long.labels == sum(map(len, nats.values())) and short.labels > 20 * LENGTH
    assert long.beyond.labels == len(beyond) > 100
    assert long.beyond.nats_per_token == pytest.approx(sum(beyond) / len(beyond), rel=1e-5)
    assert long.beyond.in_training_rows == pytest.approx(sum(anew) / len(anew), rel=1e-5)
    assert abs(long.beyond.nats_per_token - long.beyond.in_training_rows) > 1e-3


def _plain_losses(decoder: Any, tokens: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    logits, _ = decoder.logits(tokens, None, starts)
    return -logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)


def test_command_prints_and_draws(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "positions.png"
    arguments = ["evaluate", str(run), "--samples", "16", "--lengths", "32, 96", "--plot", str(picture)]
    ended = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    figures = json.loads(ended.stdout)
    assert [result["length"] for result in figures["by_position"]] == [32, 96] and figures["sources"] == {}
    assert picture.read_bytes().startswith(b"\x89PNG")
    alone = figures["by_position"][0]
    assert alone["nats_per_token"] == pytest.approx(figures["nats_per_token"], rel=1e-4)
    text = evaluate_checkpoint(run, 16, [32, 96]).to_text()
    assert "64 to 95" not in text and "64 to 127" in text and "what lies further back" in text
    assert evaluate_checkpoint(run, 4, []).by_position[0].length == LENGTH


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    for text in ("", "512,", "1", "-4", "long"):
        with pytest.raises(InputError, match="--lengths .*: expected numbers of tokens"):
            parse_lengths(text)
    assert parse_lengths("64,8, 64") == [8, 64]
    with pytest.raises(InputError, match="must end in one of .png"):
        evaluate_checkpoint(run, 4, [], tmp_path / "positions.txt")
    words = tiny_config(model=model_section(**hat_model()), data={"tokenizer": {"type": "hierarchical_bytes"}})
    with pytest.raises(InputError, match="reads words, which may reach over the end of a segment"):
        check_lengths(words, [17])
    growing = tiny_config(model=model_section(**HYBRID))
    (note,) = check_lengths(growing, [16, 4096])
    assert "model.blocks.attention looks back without a window" in note and "positions from 16 on" in note
    assert check_lengths(growing, [16]) == [] and check_lengths(tiny_config(), [2**40]) == []
    with pytest.raises(InputError, match="model.blocks.attention grows with every token and would take"):
        check_lengths(growing, [2**30])
