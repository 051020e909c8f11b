"""Texts of a model in training: the same in every layout, and training never notices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import list_checkpoints
from pretrain.config import parse_config
from pretrain.errors import InputError
from pretrain.generate import generate_text
from pretrain.observe.samples_log import SamplesLog
from tests.models.expert_models import expert_model
from tests.models.hat_models import WORDS
from tests.parallel.test_experts import MODEL as EXPERTS
from tests.runs import curve, raw_config, write_corpus

PROGRAMS = "tests.observe.programs"
SAMPLES = {"prompts": ["the state", "", "of a"], "max_new_tokens": 5, "temperature": 0.9, "top_k": 50}

# (model, processes, parallel section); the reference is one process.
MODELS: dict[str, dict[str, Any]] = {
    "experts": {"model": EXPERTS | {"tie_embeddings": True}},
    "hnet": {"model": expert_model("hnet")},
    "hat": {"model": expert_model("hat"), "data": WORDS},
}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "experts_expert2_tensor2_sequence_zero2": (
        "experts",
        4,
        {"expert": 2, "tensor": 2, "sequence": True, "zero": 2},
    ),
    "experts_pipeline4_zero1": ("experts", 4, {"pipeline": 4, "zero": 1}),
    "experts_context2_expert2_zero2": ("experts", 4, {"context": 2, "expert": 2, "zero": 2}),
    "experts_data2_zero3": ("experts", 2, {"zero": 3}),
    "experts_expert2_pipeline2_zero1": ("experts", 4, {"expert": 2, "pipeline": 2, "zero": 1}),
    "hnet_expert2_tensor2_zero1": ("hnet", 4, {"expert": 2, "tensor": 2, "zero": 1}),
    "hat_tensor2_zero1": ("hat", 2, {"tensor": 2, "zero": 1}),
    "hat_data2_zero3": ("hat", 2, {"zero": 3}),
}
# Further ones are in test_step_figures.py.
FAST = ["experts_pipeline4_zero1"]


@pytest.fixture(scope="module")
def alone(worker_pools):
    """What one process writes, by model."""
    found: dict[str, list[str]] = {}

    def texts(kind: str) -> list[str]:
        if kind not in found:
            ((_, found[kind]),) = worker_pools(1).run(
                PROGRAMS, "step_and_sample", overrides=MODELS[kind], wanted=SAMPLES
            )
        return found[kind]

    return texts


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LAYOUTS]
)
def test_every_layout_writes_the_same_and_takes_the_same_steps(layout, worker_pools, alone):
    kind, processes, parallel = LAYOUTS[layout]
    overrides, pool = MODELS[kind] | {"parallel": parallel}, worker_pools(processes)
    sampled = pool.run(PROGRAMS, "step_and_sample", overrides=overrides, wanted=SAMPLES)
    assert len(alone(kind)) == 3 and len(set(alone(kind))) == 3
    assert [texts for _, texts in sampled] == [alone(kind)] * processes
    unsampled = pool.run(PROGRAMS, "step_and_sample", overrides=overrides, wanted=None)
    assert [steps for steps, _ in sampled] == [steps for steps, _ in unsampled], "bit for bit"


def run_section(directory: Path, samples: dict[str, Any] | None, **train: Any) -> dict[str, Any]:
    write_corpus(directory / "corpus", 20)
    settings = {"steps": 6, "checkpoint_every": 2, "evaluate_every": 3, "evaluate_samples": 4, **train}
    raw = raw_config(directory, parallel={"zero": 0}, train=settings) | {"schedule": {"type": "constant"}}
    raw["data"]["held_out_fraction"] = 0.4
    if samples is not None:
        raw["observe"] = {"per_block": False, "states": False, "samples": samples}
    return raw


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sampled(worker_pools, tmp_path_factory) -> Path:
    """A run whose rows go on from step to step, sampled after steps 2, 4, 6."""
    directory = tmp_path_factory.mktemp("sampled")
    raw = run_section(directory, SAMPLES | {"every": 2}, carry_state=True)
    worker_pools(1).run("tests.training.programs", "run_training", raw=raw)
    return directory


def test_a_run_takes_the_steps_that_it_takes_without_samples(sampled, worker_pools, tmp_path):
    raw = run_section(tmp_path, None, carry_state=True)
    worker_pools(1).run("tests.training.programs", "run_training", raw=raw)
    assert curve(tmp_path / "run") == curve(sampled / "run")
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    places = [(line["step"], line["prompt"]) for line in lines(sampled / "run")]
    assert places == [(step, prompt) for step in (2, 4, 6) for prompt in SAMPLES["prompts"]]


def test_a_sample_is_what_the_checkpoint_of_the_step_writes(sampled):
    checkpoint = list_checkpoints(sampled / "run" / "checkpoints")[1]
    options = {key: value for key, value in SAMPLES.items() if key != "prompts"}
    texts = generate_text(checkpoint, SAMPLES["prompts"], **options, seed=0, device="cpu")
    assert checkpoint.name == "step-00000004"
    assert texts == [line["text"] for line in lines(sampled / "run") if line["step"] == 4]
    assert all(texts)


def test_a_resume_writes_nothing_twice(sampled, worker_pools, tmp_path):
    shutil.copytree(sampled, tmp_path, dirs_exist_ok=True)
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        if checkpoint.name > "step-00000002":
            shutil.rmtree(checkpoint)
    file = tmp_path / "run" / "samples.jsonl"
    # Killed while it wrote the second of three lines.
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:4]) + '{"step": 4, "pro')
    raw = run_section(tmp_path, SAMPLES | {"every": 2}, carry_state=True)
    worker_pools(1).run("tests.training.programs", "run_training", raw=raw)
    assert file.read_text() == (sampled / "run" / "samples.jsonl").read_text()
    # Steps that are trained again take their samples with them, also where none are asked for any more.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    raw = run_section(tmp_path, None, carry_state=True)
    worker_pools(1).run("tests.training.programs", "run_training", raw=raw)
    assert {line["step"] for line in lines(tmp_path / "run")} == {2, 4}


def test_logits_that_are_not_finite_are_no_samples_and_no_end(worker_pools, tmp_path):
    raw = run_section(tmp_path, SAMPLES | {"every": 2}, steps=2)
    (said,) = worker_pools(1).run(PROGRAMS, "run_with_infinite_logits", raw=raw)
    assert "step 2: no samples, because the model's logits are not finite" in said
    assert lines(tmp_path / "run") == []


def test_any_text_is_kept(tmp_path):
    with SamplesLog(tmp_path / "samples.jsonl") as log:
        log.append(3, ["a\n", "\ud800"], ["\u2028é\x00", ""])
    assert [tuple(line.values()) for line in lines(tmp_path)] == [(3, "a\n", "\u2028é\x00"), (3, "\ud800", "")]


@pytest.mark.parametrize(
    ("key", "value"),
    [("every", 0), ("prompts", []), ("temperature", float("inf")), ("top_p", 0), ("max_new_tokens", 0)],
)
def test_what_cannot_be_sampled_is_refused(key, value):
    with pytest.raises(InputError, match=f"observe.samples.{key}"):
        parse_config(raw_config(Path("unused"), observe={"samples": {key: value}}), "test")
