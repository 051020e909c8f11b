"""Steps whose rows go on with their states are the same in every layout, and so are the states they leave."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pretrain.errors import InputError
from pretrain.models.registry import sequence_mixers
from pretrain.plan import plan
from tests.configurations import tiny_config
from tests.parallel.carried_programs import whole_states
from tests.parallel.test_parity import LAYOUTS, assert_same_run, with_small_input_gates

PROGRAMS = "tests.parallel.carried_programs"
STEPS = 2


def every_bounded_mixer() -> dict[str, Any]:
    """A block of each sequence mixer, its attention with a window longer than a step, and one of no mixer."""
    mixers = {name: family.config.examples(32)[0].model_dump() for name, family in sequence_mixers().items()}
    mixers["attention"] = {"type": "attention", "num_heads": 4, "num_key_value_heads": 1, "sliding_window": 24}
    swiglu = {"type": "swiglu", "intermediate_size": 32}
    blocks = {name: {"mixer": mixer, "channel": swiglu} for name, mixer in mixers.items()}
    blocks["routed"] = {"channel": {"type": "moe", "num_experts": 4, "intermediate_size": 16}}
    layers = list(blocks) if len(blocks) % 2 == 0 else [*blocks, "mlstm"]
    sizes = {"hidden_size": 32, "num_layers": len(layers)}
    return with_small_input_gates(sizes | {"layers": layers, "blocks": blocks})


MODEL = every_bounded_mixer()
TRAIN = {"carry_state": True, "global_batch_size": 4}


@pytest.fixture(scope="module")
def one_process(worker_pools):
    overrides = {"model": MODEL, "train": TRAIN | {"micro_batch_size": 4}}
    return worker_pools(1).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)


@pytest.mark.parametrize(
    ("layout", "micro_batch_size", "recompute"),
    [
        ("tensor2_sequence_zero1", 2, "block"),
        ("pipeline2_zero1", 1, "none"),
        ("data2_zero1", 1, "none"),
        ("data2_zero3", 2, "none"),
    ],
)
def test_steps_that_go_on_are_those_of_one_process(
    layout, micro_batch_size, recompute, worker_pools, one_process
) -> None:
    processes, parallel = LAYOUTS[layout]
    train = TRAIN | {"micro_batch_size": micro_batch_size, "recompute": recompute}
    overrides = {"parallel": parallel, "model": MODEL, "train": train}
    results = worker_pools(processes).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)
    assert_same_run(results, one_process, relative=1e-5, weights=5e-5)
    states, expected = whole_states(results), whole_states(one_process)
    assert states.keys() == expected.keys()
    for name, rows in states.items():
        assert len(rows) == 4
        # Weights have moved apart by rounding, and the states with them.
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(rows, expected[name], atol=1e-3 * largest, rtol=0, err_msg=name)


def test_what_cannot_go_on_is_refused() -> None:
    def refused(**sections: Any) -> str:
        with pytest.raises(InputError) as caught:
            tiny_config(**{"train": {"carry_state": True}} | sections)
        return str(caught.value)

    hnet = {
        "type": "hnet",
        "stages": [{"hidden_size": 64, "encoder": ["mlstm"], "decoder": ["mlstm"], "target_ratio": 4}],
    }
    attention = {"mixer": {"type": "attention", "num_heads": 4}}
    assert "data.packing=best_fit" in refused(data={"packing": "best_fit"})
    assert "leave out data.stream" in refused(data={"stream": {}})
    assert "parallel.context=2" in refused(parallel={"context": 2})
    assert "model.hierarchy.type=hnet" in refused(model=tiny_config().model.model_dump() | {"hierarchy": hnet})
    grows = refused(model={"hidden_size": 64, "layers": ["only"], "blocks": {"only": attention}})
    assert "model.blocks.only.mixer: the state of attention grows" in grows and "sliding_window" in grows
    attention["mixer"]["sliding_window"] = 8
    model = {"hidden_size": 64, "layers": ["only"], "blocks": {"only": attention}}
    assert tiny_config(model=model, train={"carry_state": True}).train.carry_state


def test_a_plan_counts_the_states_that_are_carried() -> None:
    window = {"mixer": {"type": "attention", "num_heads": 4, "sliding_window": 24}}
    mamba = {"mixer": {"type": "mamba2", "head_size": 16, "state_size": 8}}
    model = {"num_layers": 2, "layers": ["window", "mamba"], "blocks": {"window": window, "mamba": mamba}}

    def parts(carry_state: bool, tensor: int = 1, data: int = 1) -> dict[str, int]:
        parallel = {"tensor": tensor, "data": data}
        return plan(
            tiny_config(model=model, train={"carry_state": carry_state}, parallel=parallel)
        ).bytes_per_rank_by_part

    keys = 2 * 23 * 64 + 1
    # Three windows of a convolution and the matrix of each head; see the mixer's state.
    matrix = 128 * 8 + 3 * (128 + 2 * 8)
    both = 2 * 8 * 4 * (keys + matrix)
    assert parts(False)["carried_states"] == 0
    assert parts(True)["carried_states"] == both
    assert parts(True, tensor=2)["carried_states"] == both // 2
    assert parts(True, data=2)["carried_states"] == both // 2
