"""What a checkpoint says of its run is looked at before anything goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.checkpoint.training import (
    TrainingPosition,
    check_state,
    read_position,
    restore_random_state,
    training_state,
)
from pretrain.errors import InputError
from tests.configurations import tiny_config
from tests.fuzzing import JSON_VALUES, changed, fast_and_slow

DATA = {"data_fingerprint": "abc", "bookmarks": {"only": {"begin": 0}}, "source_fingerprints": {"a": "b"}}
MIXTURE = {"mixture_phases": [{"first": 0, "weights": {"a": 1.0}}]}


def stored(state: Any) -> Any:
    """What stands for the reader of a checkpoint with this state."""
    return SimpleNamespace(path=Path("run/checkpoints/step-00000004"), state=json.loads(json.dumps(state)))


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    return training_state(tiny_config(), TrainingPosition(4, 16, 512, 1, 0), DATA | MIXTURE)


def test_what_training_writes_is_sound(sound: dict[str, Any]) -> None:
    check_state(stored(sound))
    assert read_position(stored(sound)) == TrainingPosition(4, 16, 512, 1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": {"step": -1, "samples": 0, "tokens": 0}}, "position.step: input should be greater"),
        ({"position": {"step": "4", "samples": 0, "tokens": 0}}, "position.step: input should be a valid integer"),
        ({"position": None}, "position: "),
        ({"random_state": "no hex"}, "random_state: "),
        ({"random_state": "00ff"}, "random_state is none of torch's generator"),
        ({"bookmarks": {"only": 3}}, "bookmarks.only: "),
        ({"data_fingerprint": None}, "data_fingerprint: "),
        ({"config": {"train": []}}, "config.train: "),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str, sound: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"step-00000004/state\.json: {message}"):
        check_state(stored(sound | changes))


@fast_and_slow(100, 5000)
def test_a_state_of_anything(examples: int, sound: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    # A whole configuration has hundreds of places; what is looked at has few.
    small = sound | {"config": {"train": sound["config"]["train"]}}

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(changed(small, JSON_VALUES | st.sampled_from(["00", "zz"])))
    def check(mangled: dict[str, Any]) -> None:
        reader = stored(mangled)
        try:
            check_state(reader)
        except InputError:
            return
        position = read_position(reader)
        assert all(type(value) is int and value >= 0 for value in vars(position).values())
        restore_random_state(reader)

    try:
        check()
    finally:
        torch.set_rng_state(before)
