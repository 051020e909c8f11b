"""Training with a teacher: the loss from its definition, the same in every layout, and what it learns with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy, kl_div

from pretrain.errors import InputError
from pretrain.models.decoder import IGNORED_LABEL
from pretrain.models.loading import load_decoder
from pretrain.models.mixer import Documents
from tests.configurations import tiny_config
from tests.distill.models import attention_model, write_student
from tests.distill.programs import gradients, refusal
from tests.parallel.programs import assemble, synthetic_batch
from tests.workers import WorkerPool

TERMS = {
    "logits": {"weight": 0.7, "temperature": 2.0},
    "layer_outputs": {"weight": 0.4, "layers": "all"},
    "labels": {"weight": 0.3},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (1, {"zero": 1}),
    "tensor2": (2, {"tensor": 2, "zero": 0}),
    "tensor2_sequence_zero1": (2, {"tensor": 2, "sequence": True, "zero": 1}),
    "data2_zero0": (2, {"zero": 0}),
    "data2_zero2": (2, {"zero": 2}),
    "data2_zero3": (2, {"zero": 3}),
}

FAST = {("tensor2", "everything"), ("tensor2_sequence_zero1", "replaced"), ("data2_zero3", "replaced")}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_student(tmp_path_factory.mktemp("distill"))


def sections(directories: tuple[Path, Path], **keys: Any) -> dict[str, Any]:
    """A run of the student that learns from the teacher."""
    teacher, student = directories
    model = yaml.safe_load((student / "config.yaml").read_text())["model"]
    return {"model": model, "distillation": {"teacher": str(teacher), **TERMS, **keys}}


@pytest.mark.parametrize("relative", [True, False])
def test_the_loss_is_its_definition(directories: tuple[Path, Path], relative: bool) -> None:
    term = TERMS["layer_outputs"] | {"error": "relative" if relative else "squared"}
    shown, found = gradients(sections(directories, layer_outputs=term), str(directories[1]))

    batch = synthetic_batch([0, 1], 16)
    counts = (batch.labels != IGNORED_LABEL).t()
    # Another process group each: the teacher is read out before the student is loaded.
    logits, outputs = [], []
    layers = ["0", "1", "2"]
    for directory, learns in zip(directories, (False, True), strict=True):
        decoder = load_decoder(directory).decoder.requires_grad_(learns)
        found_logits, found_outputs = decoder.logits_and_outputs(batch.tokens, Documents(batch.document_starts), layers)
        logits.append(found_logits)
        outputs.append(found_outputs)
    teacher, student = logits
    divergence = kl_div((student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="none")
    expected = 0.7 * 4 * (divergence.sum(-1) * counts).sum()
    errors = 0.0
    for layer in layers:
        error = (outputs[1][layer] - outputs[0][layer]).square().mean(-1)
        errors += (error / outputs[0][layer].square().mean(-1) if relative else error)[counts].sum() / 3
    nats = cross_entropy(student[counts], batch.labels.t()[counts], reduction="sum")
    expected = expected + 0.4 * errors + 0.3 * nats
    assert shown == pytest.approx(nats.item(), rel=1e-5)
    expected.backward()
    own = {name: p.grad for name, p in decoder.named_parameters()}
    assert own.keys() == found.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5 * gradient.abs().max().item() + 1e-7, rtol=0)


def test_recomputed_blocks_have_the_same_gradients(directories: tuple[Path, Path]) -> None:
    given = sections(directories)
    loss, expected = gradients(given, str(directories[1]))
    again, found = gradients(given | {"train": {"recompute": "block"}}, str(directories[1]))
    assert again == loss and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6 * gradient.abs().max().item(), rtol=0)


@pytest.fixture(scope="module")
def one_process(
    directories: tuple[Path, Path], worker_pools: Callable[[int], WorkerPool]
) -> Callable[[str], dict[str, Any]]:
    cache: dict[str, dict[str, Any]] = {}

    def run(train_only: str) -> dict[str, Any]:
        if train_only not in cache:
            given = sections(directories, train_only=train_only)
            arguments = {"sections": given, "student": str(directories[1]), "steps": 2}
            (cache[train_only],) = worker_pools(1).run("tests.distill.programs", "distil", **arguments)
        return cache[train_only]

    return run


@pytest.mark.parametrize(
    ("layout", "train_only"),
    [
        pytest.param(layout, train_only, marks=[] if (layout, train_only) in FAST else pytest.mark.slow)
        for layout in LAYOUTS
        for train_only in ("everything", "replaced")
    ],
)
def test_every_layout_takes_the_same_steps(
    layout: str,
    train_only: str,
    directories: tuple[Path, Path],
    one_process: Callable[[str], dict[str, Any]],
    worker_pools: Callable[[int], WorkerPool],
) -> None:
    processes, parallel = LAYOUTS[layout]
    given = sections(directories, train_only=train_only) | {"parallel": parallel}
    arguments = {"sections": given, "student": str(directories[1]), "steps": 2}
    results = worker_pools(processes).run("tests.distill.programs", "distil", **arguments)
    reference = one_process(train_only)
    for result in results:
        found, expected = (
            [(loss, norm) for loss, norm, applied in run["trajectory"] if applied] for run in (result, reference)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        for own, others in zip(result["terms"], reference["terms"], strict=True):
            assert own == pytest.approx(others, rel=1e-5)
    whole, whole_one = assemble(results), assemble([reference])
    assert whole.keys() == whole_one.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(value, whole_one[name], atol=5e-5, rtol=0, err_msg=name)


def test_only_replaced_layers_learn(one_process: Callable[[str], dict[str, Any]]) -> None:
    changed = one_process("replaced")["changed"]
    learns = {
        name
        for name in one_process("replaced")["weights"]
        if name.startswith(("layers.1.mixer.", "layers.1.mixer_norm."))
    }
    assert changed == learns and len(learns) > 10
    assert one_process("everything")["changed"] == one_process("everything")["weights"].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distillation": {"teacher": "nowhere"}}, "distillation.teacher: .*nowhere"),
        ({"model": {"vocab_size": 272}}, "has vocab_size=264, but model.vocab_size is 272"),
        ({"model": {"num_layers": 6, "layers": ["attention"]}}, "has num_layers=3, but the student has 6"),
        ({"model": attention_model()}, "has the student's mixers in every layer"),
        (
            {"data": {"tokenizer": {"type": "hierarchical_bytes"}}},
            "reads tokens of type bytes, but data.tokenizer.type",
        ),
    ],
)
def test_teachers_that_do_not_fit(change: dict[str, Any], message: str, directories: tuple[Path, Path]) -> None:
    given = sections(directories, train_only="replaced")
    for name, section in change.items():
        given[name] = given.get(name, {}) | section
    with pytest.raises(InputError, match=message):
        raise InputError(refusal(given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel": {"pipeline": 3}}, "distillation does not go with parallel.pipeline=3"),
        ({"parallel": {"context": 2}}, "distillation does not go with parallel.context=2"),
        ({"train": {"carry_state": True}, "data": {"packing": "concatenate"}}, "carry_state"),
        ({"train": {"loss_chunk_size": 8}}, "distillation does not go with train.loss_chunk_size"),
        ({"distillation": {"layer_outputs": {"layers": [0, 3]}}}, "names layer 3, but layers are counted from 0 to 2"),
        ({"distillation": {"logits": {"weight": 0}}}, "both 0, so nothing is learned from the teacher"),
    ],
)
def test_layouts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": attention_model(), "distillation": {"teacher": "somewhere"}}
    for name, section in change.items():
        given[name] = given.get(name, {}) | section
    with pytest.raises(InputError, match=message):
        tiny_config(**given)
