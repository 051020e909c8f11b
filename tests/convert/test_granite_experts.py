"""A Granite model with experts and multipliers: what it learns after its import is exported, and comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pretrain.convert import export_model, import_model
from pretrain.models.loading import load_decoder
from tests.convert.checkpoints import random_tokens
from tests.convert.native_models import MULTIPLIERS, random_model, tensors_in
from tests.runs import write_corpus
from tests.training.programs import run_training

NAME = "granite, experts and multipliers"


@torch.no_grad()
def test_it_trains_a_step_and_comes_back(saved: Callable[[str], Path], base: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    report = import_model(saved(NAME), tmp_path / "imported", base=base, check=False)
    assert [f"{key}={value} was multiplied into the weights" for key, value in sorted(MULTIPLIERS.items())] == [
        note for note in report.notes if "multiplied" in note
    ]
    raw = yaml.safe_load((tmp_path / "imported" / "config.yaml").read_text())
    raw["train"] |= {"steps": 1, "evaluate_every": 0}
    raw["schedule"] |= {"warmup_steps": 0}
    assert run_training(raw, str(tmp_path / "imported")) == (1, False)

    exported = export_model(tmp_path / "run", tmp_path / "exported")
    assert exported.architecture == "GraniteMoeHybridForCausalLM" and exported.step == 1
    tokens = random_tokens(2, 40)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()(tokens).logits
    ours, _ = load_decoder(tmp_path / "run").decoder.logits(tokens)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert (theirs - random_model(NAME)(tokens).logits).abs().max() > 1e-2

    import_model(tmp_path / "exported", tmp_path / "again", base=base)
    again, _ = load_decoder(tmp_path / "again").decoder.logits(tokens)
    torch.testing.assert_close(again, ours, atol=1e-5, rtol=0)


def test_without_one_of_its_multipliers_it_is_another_model() -> None:
    """The comparison with the class would find a multiplier that is forgotten."""
    tokens = random_tokens(2, 40)
    model = random_model(NAME)
    with torch.no_grad():
        expected = model(tokens).logits
        for field in MULTIPLIERS:
            other = AutoModelForCausalLM.from_config(
                type(model.config).from_dict(model.config.to_dict() | {field: 1.0})
            ).eval()
            other.load_state_dict(model.state_dict())
            assert (other(tokens).logits - expected).abs().max() > 0.1, field


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_written_in_shards_of_any_size(
    dtype: str, saved: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    import_model(saved("granite, experts"), tmp_path / "imported", base=base, check=False)
    report = export_model(tmp_path / "imported", tmp_path / "exported", dtype=dtype, max_shard_size="20KB")
    assert report.files > 3 and report.comparison.agrees
    before, after = tensors_in(saved("granite, experts")), tensors_in(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].to(after[key].dtype), after[key]) for key in before)
