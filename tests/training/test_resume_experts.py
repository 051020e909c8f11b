"""A checkpoint does not know which rank held which expert: it is read back with experts split otherwise, or whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import CheckpointReader, list_checkpoints
from tests.models.expert_models import expert_model
from tests.runs import assert_same_curve, curve, raw_config, write_corpus

MODEL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_layers": 2,
    "layers": ["experts"],
    "blocks": {
        "experts": {
            "mixer": {"type": "mlstm", "num_heads": 2, "chunk_size": 8},
            "channel": {"type": "moe", "num_experts": 4, "intermediate_size": 24, "router_size": 8},
        }
    },
}
LAYOUTS = {
    "single": (1, {"zero": 1}),
    "expert2_zero0": (2, {"expert": 2, "zero": 0}),
    "expert2_zero1": (2, {"expert": 2, "zero": 1}),
    "expert2_zero2": (2, {"expert": 2, "zero": 2}),
    "pipeline2": (2, {"pipeline": 2, "zero": 1}),
    "data2_zero3": (2, {"zero": 3}),
}


@pytest.fixture(scope="module")
def train(worker_pools):
    def run(directory: Path, *legs: tuple[str, int], model: dict[str, Any] = MODEL) -> Path:
        """The run directory after training in each layout up to a step."""
        write_corpus(directory / "corpus")
        for layout, until in legs:
            processes, parallel = LAYOUTS[layout]
            raw = raw_config(
                directory, parallel=parallel, model=model, schedule={"type": "constant", "warmup_steps": 0}
            )
            raw["train"]["steps"] = until
            worker_pools(processes).run("tests.training.programs", "run_training", raw=raw)
        return directory / "run"

    return run


def test_experts_move_between_ranks_at_every_resume(train, tmp_path) -> None:
    whole = curve(train(tmp_path / "whole", ("single", 12)))
    legs = ("expert2_zero1", 2), ("single", 4), ("expert2_zero2", 6), ("pipeline2", 8), ("expert2_zero0", 10)
    moved = curve(train(tmp_path / "moved", *legs, ("data2_zero3", 12)))
    assert_same_curve(moved, whole)


def test_experts_of_every_network_of_a_hierarchy_move(train, tmp_path) -> None:
    model = expert_model("hnet")
    whole = curve(train(tmp_path / "whole", ("single", 4), model=model))
    moved = curve(train(tmp_path / "moved", ("expert2_zero1", 2), ("single", 4), model=model))
    assert_same_curve(moved, whole)


def test_same_layout_resumes_bit_for_bit(train, tmp_path) -> None:
    whole = curve(train(tmp_path / "whole", ("expert2_zero1", 8)))
    assert curve(train(tmp_path / "cut", ("expert2_zero1", 4), ("expert2_zero1", 8))) == whole


def test_checkpoint_holds_every_expert_once(train, tmp_path) -> None:
    held = {}
    for layout in ("single", "expert2_zero1", "pipeline2"):
        run = train(tmp_path / layout, (layout, 1))
        held[layout] = CheckpointReader(list_checkpoints(run / "checkpoints")[-1])
    names = held["single"].names("weight")
    assert sum(".experts." in name for name in names) == 2 * 4 * 3
    assert sum(name.startswith("shared.") for name in names) == 4
    for layout in ("expert2_zero1", "pipeline2"):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert held[layout].names(kind) == names
            for name in names:
                difference = (held[layout].read(name, kind) - held["single"].read(name, kind)).abs().max()
                assert difference < 2e-5, (layout, name, kind)
