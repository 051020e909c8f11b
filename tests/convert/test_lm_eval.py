"""The evaluation harness (extra ``evaluation``) on exported models: its figures are those of our own model.

Local tasks, nothing is fetched. The harness and what it asks for are large, so these tests run where it is installed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.tokenizers.byte_level import ByteTokenizer
from pretrain.convert import export_model
from pretrain.models.decoder import Decoder
from tests.convert.checkpoints import model_section, write_run

TOKENIZER = ByteTokenizer()
TEXTS = [
    "The state is carried on.",
    "A second document, a little longer than the first one.",
    "Third: na\u00efve \u6587.",
]
QUESTIONS = [
    {"question": "Two and two is", "choices": ["four", "a very long answer", "x"], "answer": 0},
    {"question": "The grass is", "choices": ["blue", "green", "not here at all"], "answer": 1},
    {"question": "After one comes", "choices": ["seventeen", "one", "two"], "answer": 2},
]
# One of a class of transformers, one with code of its own.
OWN = {"mixer": {"type": "para_gru", "num_heads": 4}, "channel": {"type": "swiglu"}}
MODELS = {"xlstm": model_section(), "own_code": model_section(layers=["own"], blocks={"own": OWN})}


def _write_tasks(directory: Path) -> None:
    def task(name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
        }
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(common | settings))

    directory.mkdir()
    task(
        "local_text",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    task(
        "local_choice",
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )


def _log_likelihood(decoder: Decoder, before: bytes, text: bytes) -> float:
    """Nats of ``text`` behind ``before`` at the beginning of a document."""
    tokens = torch.tensor([[*before, *text]])
    logits, _ = decoder.logits(tokens[:, :-1])
    of_labels = logits.log_softmax(-1)[0].gather(1, tokens[0, 1:, None])
    return float(of_labels[-len(text) :].double().sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_the_harness_finds_what_our_model_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install -e ".[evaluation]"')
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run, decoder = write_run(tmp_path / "run", MODELS[name])
    report = export_model(run, tmp_path / "exported")
    assert report.needs_code == (name == "own_code")
    _write_tasks(tmp_path / "tasks")
    arguments = {"pretrained": str(tmp_path / "exported"), "trust_remote_code": report.needs_code, "dtype": "float32"}
    found = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=["local_text", "local_choice"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )["results"]

    boundary, nats, size = TOKENIZER.boundary_id, 0.0, 0
    for text in TEXTS:
        tokens = torch.tensor([[boundary, *text.encode()]])
        logits, _ = decoder.logits(tokens[:, :-1])
        nats -= float(logits.log_softmax(-1)[0].gather(1, tokens[0, 1:, None]).double().sum())
        size += len(text.encode())
    # The class computes in float32 too, in another order; the export was held to 1e-4 in each logit.
    assert found["local_text"]["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-4)
    right = 0
    for row in QUESTIONS:
        # Unlike text that is rolled over, questions begin with no boundary mark: the tokenizer adds none by itself.
        scores = [
            _log_likelihood(decoder, row["question"].encode(), f" {choice}".encode()) for choice in row["choices"]
        ]
        right += max(range(3), key=scores.__getitem__) == row["answer"]
    assert found["local_choice"]["acc,none"] == pytest.approx(right / 3)
