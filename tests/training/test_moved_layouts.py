"""Every family moves between layouts with its optimizer's state, also in bfloat16: the curve is the unbroken one.

Models of routed experts are in ``test_resume_experts.py``, states that rows go on with in ``test_carried_states.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import CheckpointReader, list_checkpoints
from tests.configurations import every_mixer_model
from tests.models.hat_models import WORDS, hat_model
from tests.models.hnet_models import hnet_model
from tests.parallel.test_parity import with_small_input_gates
from tests.runs import assert_same_curve, curve, raw_config, write_corpus

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {"zero": 1}),
    "tensor2": (2, {"tensor": 2, "zero": 1}),
    "tensor2_sequence": (2, {"tensor": 2, "sequence": True, "zero": 0}),
    "pipeline2": (2, {"pipeline": 2, "zero": 1}),
    "data2_zero2": (2, {"zero": 2}),
    "data2_zero3": (2, {"zero": 3}),
}


@pytest.fixture(scope="module")
def train(worker_pools):
    def run(directory: Path, *legs: tuple[str, int], **sections: dict[str, Any]) -> Path:
        """The run directory after training in each layout up to a step."""
        write_corpus(directory / "corpus")
        for layout, until in legs:
            processes, parallel = LAYOUTS[layout]
            raw = raw_config(directory, parallel=parallel)
            # The schedule must not know that the run is cut.
            raw["schedule"] = {"type": "constant"}
            raw["train"] |= {"steps": until, "evaluate_every": 0, "evaluate_samples": 1, "checkpoint_every": 0}
            for name, section in sections.items():
                raw[name] = section if name == "model" else raw[name] | section
            worker_pools(processes).run("tests.training.programs", "run_training", raw=raw)
        return directory / "run"

    return run


# One step in each layout; all but the first begin with the moments of another.
FAMILIES: dict[str, tuple[dict[str, dict[str, Any]], list[str]]] = {
    "every mixer": (
        {"model": with_small_input_gates(every_mixer_model(64, vocab_size=264))},
        ["tensor2_sequence", "pipeline2", "data2_zero3", "single"],
    ),
    "every mixer, tied and uneven": (
        {"model": with_small_input_gates(every_mixer_model(64, vocab_size=257, tie_embeddings=True))},
        ["pipeline2", "tensor2", "single"],
    ),
    "hnet": ({"model": hnet_model(2)}, ["tensor2", "data2_zero3", "single"]),
    "hat": ({"model": hat_model(), "data": WORDS}, ["data2_zero2", "tensor2", "single"]),
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name.endswith("uneven") else ()) for name in FAMILIES]
)
def test_every_family_moves_between_layouts(family, train, tmp_path) -> None:
    sections, layouts = FAMILIES[family]
    whole = curve(train(tmp_path / "whole", ("single", len(layouts)), **sections))
    legs = [(layout, step) for step, layout in enumerate(layouts, start=1)]
    moved = curve(train(tmp_path / "moved", *legs, **sections))
    assert_same_curve(moved, whole)


BFLOAT16 = {"train": {"precision": "bfloat16"}}


@pytest.fixture(scope="module")
def in_bfloat16(train, tmp_path_factory) -> Path:
    """An unbroken run of eight steps in one process."""
    return train(tmp_path_factory.mktemp("bfloat16"), ("single", 8), **BFLOAT16)


def test_a_run_in_bfloat16_moves_between_layouts(train, in_bfloat16, tmp_path) -> None:
    """Loss within 1e-3 and gradient norm within 2e-2, as between unbroken runs of these layouts."""
    legs = ("tensor2_sequence", 2), ("pipeline2", 4), ("data2_zero3", 6), ("single", 8)
    moved, whole = curve(train(tmp_path, *legs, **BFLOAT16)), curve(in_bfloat16)
    assert moved.keys() == whole.keys()
    for step, (loss, norm) in whole.items():
        assert moved[step][0] == pytest.approx(loss, rel=1e-3), f"step {step}"
        assert moved[step][1] == pytest.approx(norm, rel=2e-2), f"step {step}"


def test_a_run_in_bfloat16_resumes_bit_for_bit_because_float32_is_stored(train, in_bfloat16, tmp_path) -> None:
    assert curve(train(tmp_path, ("single", 3), ("single", 8), **BFLOAT16)) == curve(in_bfloat16)
    with CheckpointReader(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]) as reader:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            stored = reader.read("embedding.weight", kind)
            assert not torch.equal(stored, stored.bfloat16().float()), f"{kind} was rounded"
