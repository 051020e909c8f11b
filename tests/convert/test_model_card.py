"""Model cards: what the run's files say, valid for the hub, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pretrain.checkpoint import write_checkpoint
from pretrain.convert import export_model
from pretrain.errors import InputError
from tests.configurations import tiny_config
from tests.convert.checkpoints import model_section, pieces_of, random_decoder, write_run

SECTIONS: dict[str, Any] = {
    "data": {
        "source": None,
        "mixture": {
            "books": {"source": {"type": "jsonl", "path": "/home/someone/secret/books-*.jsonl"}, "weight": 3.0},
            "web": {"source": {"type": "huggingface", "path": "owner/web", "split": "train[:1%]"}, "weight": 1.0},
        },
        "curriculum": [{"from_tokens": 64, "weights": {"books": 1.0, "web": 1.0}}],
    },
    "schedule": {"type": "wsd", "warmup_steps": 2},
    "train": {"steps": 20, "precision": "bfloat16"},
}
POSITION = {"step": 7, "samples": 56, "tokens": 896, "skipped_steps": 0, "skipped_in_a_row": 0}
FIGURES = [
    {
        "step": 6,
        "loss": 3.0,
        "bits_per_byte": 4.328,
        "tokens": 768,
        "held_out_loss": 3.5,
        "held_out_bits_per_byte": 5.05,
    },
    {"step": 7, "loss": 2.5, "bits_per_byte": 3.607, "tokens": 896},
    {"step": 8, "loss": 1.5, "bits_per_byte": 2.164, "tokens": 1024, "held_out_loss": 1.0},
]


def trained(directory: Path, **state: Any) -> Path:
    """A run of which step 7 was saved and step 8 was logged."""
    config = tiny_config(str(directory), model=model_section(), **SECTIONS)
    whole = {"config": config.model_dump(mode="json"), "position": POSITION} | state
    write_checkpoint(directory / "checkpoints", 7, pieces_of(random_decoder(config)), whole)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in FIGURES))
    return directory


def card_of(run: Path, output: Path, **options: Any) -> ModelCard:
    export_model(run, output, check=False, **options)
    return ModelCard.load(output / "README.md")


def test_a_run(tmp_path: Path) -> None:
    card = card_of(trained(tmp_path / "run"), tmp_path / "my-model")
    data = card.data.to_dict()
    assert data == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["mlstm", "swiglu"]}
    # Named as missing, behind a comment, so that the hub reads none.
    written = (tmp_path / "my-model" / "README.md").read_text()
    assert "\n# license: apache-2.0\n" in written and "The licence, the languages" in written
    for text in (
        "# my-model",
        "| class | `xLSTMForCausalLM` |",
        "| weights | bfloat16, norms and gates float32, loaded as float32 |",
        "| layers | 2 of mlstm and swiglu |",
        "| context length in training | 16 tokens |",
        "books (75.0% of the tokens; jsonl `books-*.jsonl`), web (25.0% of the tokens; dataset `owner/web` "
        "(split train[:1%])); these shares changed over the run",
        "| tokenizer | bytes |",
        "| tokens seen | 896 |",
        "| steps | 7 of 20 |",
        "| batch | 8 sequences of 16 tokens |",
        "gradients clipped to norm 0.3",
        "| learning rate | 0.003, wsd, 2 steps of warm-up |",
        "| precision | bfloat16, weights and optimizer float32 |",
        "| training batch | 7 | 2.5000 | 3.6070 |",
        "| held-out documents of the same data | 6 | 3.5000 | 5.0500 |",
        'from_pretrained("my-model", dtype="float32")',
    ):
        assert text in card.text, text
    for text in ("trust_remote_code", "someone", "secret", "1.0000", "1.5000"):
        assert text not in card.content, text


def test_a_checkpoint_alone_says_less(tmp_path: Path) -> None:
    run, decoder = write_run(tmp_path / "run", model_section(tie_embeddings=True))
    checkpoint = (run / "checkpoints" / "step-00000007").rename(tmp_path / "kept")
    card = card_of(checkpoint, tmp_path / "out")
    assert card.data.tags == ["mlstm", "swiglu", "custom_code"]
    assert f"| parameters | {sum(weight.numel() for weight in decoder.parameters()):,} |" in card.text
    assert 'from_pretrained("out", trust_remote_code=True, dtype="float32")' in card.text
    assert "embeddings tied" in card.text and "`position_ids` begin anew" in card.text
    assert "## Losses" not in card.text and "tokens seen" not in card.text


def test_imported_weights_have_no_training(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", imported_from={"architecture": "xLSTMForCausalLM", "directory": "/somewhere"})
    card = card_of(run, tmp_path / "out")
    assert "| weights imported from | `xLSTMForCausalLM`, not trained since |" in card.text
    for text in ("## Training", "## Losses", "context length", "somewhere"):
        assert text not in card.text


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": null, "skipped": true}\n')
    assert "## Losses" not in card_of(run, tmp_path / "out").text


def test_damaged_figures_are_said_before_anything_is_written(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": \n{"step": 7}\n')
    with pytest.raises(InputError, match="metrics.jsonl: line 1 is damaged"):
        export_model(run, tmp_path / "out", check=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
