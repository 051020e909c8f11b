"""What plans say of runs that learn from a teacher, against what torch holds and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import CheckpointReader, resolve_checkpoint
from pretrain.config import Config
from pretrain.errors import InputError
from pretrain.plan import plan
from pretrain.plan.search import search
from tests.configurations import tiny_config
from tests.distill.models import write_student
from tests.plan.peaks import most_held

LAYERS = {"layer_outputs": {"weight": 1.0, "layers": "all"}}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher and its student."""
    return write_student(tmp_path_factory.mktemp("models"))


def _run(directories: tuple[Path, Path], terms: dict[str, Any], **train: Any) -> Config:
    teacher, student = directories
    with CheckpointReader(resolve_checkpoint(student)) as reader:
        model = reader.state["config"]["model"]
    sizes = {"global_batch_size": 4, "micro_batch_size": 2} | train
    distillation = {"teacher": str(teacher), **terms}
    return tiny_config(model=model, data={"sequence_length": 128}, distillation=distillation, train=sizes)


@pytest.mark.parametrize(
    ("terms", "train"),
    [
        ({}, {"recompute": "block"}),
        (LAYERS, {"precision": "bfloat16"}),
        (LAYERS | {"logits": {"weight": 0.0}}, {}),
    ],
)
def test_a_step_holds_within_a_tenth_of_what_is_planned(directories, terms, train) -> None:
    config = _run(directories, terms, **train)
    held, _ = most_held(config)
    planned = plan(config, 1)
    assert held == pytest.approx(planned.bytes_per_rank, rel=0.1)
    assert planned.heaviest_moment == "the loss" and planned.uncounted_teacher is None


def test_a_teacher_s_weights_are_whole_under_every_stage_and_its_work_is_counted(directories) -> None:
    config = _run(directories, {})
    alone = config.model_copy(update={"distillation": None})
    with CheckpointReader(resolve_checkpoint(directories[0])) as reader:
        taught = plan(tiny_config(model=reader.state["config"]["model"], data={"sequence_length": 128}), 1)
    parts = plan(config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero": 3})}), 2)
    assert parts.bytes_per_rank_by_part["teacher"] == 4 * taught.parameters
    # A forward pass is a third of what a step of it would take, but for attention, whose backward takes 5 for 2.
    more = plan(config, 1).hardware_flops_per_token - plan(alone, 1).hardware_flops_per_token
    assert taught.hardware_flops_per_token / 3.5 < more < taught.hardware_flops_per_token / 3
    assert plan(config, 1).flops_per_token == plan(alone, 1).flops_per_token
    best = search(config, 1, "l4").fitting[0]
    assert best.step.compute > search(alone, 1, "l4").fitting[0].step.compute


def test_a_teacher_that_cannot_be_read_is_said(directories, tmp_path: Path) -> None:
    config = _run(directories, {})
    (tmp_path / "empty").mkdir()
    for teacher, message in (("nowhere", None), ("empty", "distillation.teacher: .* holds no checkpoint")):
        settings = config.distillation.model_copy(update={"teacher": str(tmp_path / teacher)})
        changed = config.model_copy(update={"distillation": settings})
        if message is None:
            assert plan(changed, 1).uncounted_teacher == str(tmp_path / teacher)
            assert plan(changed, 1).bytes_per_rank_by_part["teacher"] == 0
        else:
            with pytest.raises(InputError, match=message):
                plan(changed, 1)
