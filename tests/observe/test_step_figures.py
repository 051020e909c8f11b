"""Figures of blocks and layers: the same in every layout, and in agreement with those of the whole model."""

from __future__ import annotations

import json
import math

import pytest

from pretrain.config import parse_config
from pretrain.errors import InputError
from pretrain.observe.step_figures import block_of
from tests.parallel.test_experts import MODEL as EXPERTS
from tests.runs import raw_config, write_corpus

PROGRAMS = "tests.observe.programs"
RECURRENT = ["mlstm", "mlstm_pre_up", "slstm", "mamba2", "para_gru", "para_lstm"]
GATES = {
    "mlstm": {"log_input_gate", "forget_gate", "output_gate"},
    "mlstm_pre_up": {"log_input_gate", "forget_gate"},
    "slstm": {"log_input_gate", "forget_gate", "output_gate"},
    "mamba2": {"step_size", "decay"},
    "para_gru": {"update_gate", "reset_gate"},
    "para_lstm": {"forget_gate", "output_gate"},
}
SAMPLES = {"every": 2, "prompts": ["the state", ""], "max_new_tokens": 4, "top_k": 50}
LAYOUTS = {
    "tensor2": (2, {"tensor": 2, "sequence": True, "zero": 1}),
    "pipeline2": (2, {"pipeline": 2, "zero": 0}),
    "data2_zero2": (2, {"zero": 2}),
    "data2_zero3": (2, {"zero": 3}),
    # The states of all layers but sLSTM are gathered; that waits.
    "context2_gather": (2, {"context": 2, "context_scheme": "gather", "zero": 1}),
    "context2_chain": (2, {"context": 2, "context_scheme": "chain", "zero": 0}),
    "context2_tensor2_scan": (4, {"context": 2, "context_scheme": "scan", "tensor": 2, "sequence": True, "zero": 1}),
}
FAST = ["tensor2", "pipeline2", "data2_zero3", "context2_gather"]


# Of a model with routed experts.
EXPERT_LAYOUTS = {
    "expert2_zero0": (2, {"expert": 2, "zero": 0}),
    "expert2_zero2": (2, {"expert": 2, "zero": 2}),
    "expert2_data4_zero1": (4, {"expert": 2, "zero": 1}),
    "expert2_tensor2_sequence_zero1": (4, {"expert": 2, "tensor": 2, "sequence": True, "zero": 1}),
    "expert2_pipeline2_zero0": (4, {"expert": 2, "pipeline": 2, "zero": 0}),
    "expert2_context2_zero2": (4, {"expert": 2, "context": 2, "zero": 2}),
    "data2_zero3": (2, {"zero": 3}),
}
FAST_EXPERT = ["expert2_data4_zero1"]


def raw_run(directory, parallel, **observe):
    blocks = {name: {"mixer": {"type": name}} for name in RECURRENT}
    for name in ("mlstm", "mlstm_pre_up", "slstm", "para_gru", "para_lstm"):
        blocks[name]["mixer"]["num_heads"] = 4
    blocks["mlstm"]["mixer"]["chunk_size"] = 8
    blocks["mamba2"]["mixer"] |= {"head_size": 16, "state_size": 8, "chunk_size": 8}
    blocks["slstm"]["channel"] = {"type": "swiglu"}
    model = {"num_layers": len(RECURRENT), "layers": RECURRENT, "blocks": blocks}
    train = {"steps": 2, "checkpoint_every": 0, "evaluate_every": 0, "evaluate_samples": 4}
    return raw_config(
        directory, model=model, parallel=parallel, schedule={"warmup_steps": 0}, train=train, observe=observe
    )


@pytest.fixture(scope="module")
def figures(worker_pools, tmp_path_factory):
    """The lines of two steps, of which the second is looked at, and what the model writes after it."""

    def measure(processes, parallel, model=None):
        directory = tmp_path_factory.mktemp("figures")
        write_corpus(directory / "corpus", 20)
        raw = raw_run(directory, parallel, every=2, samples=SAMPLES, peak_tflops=0.5)
        if model is not None:
            raw["model"] |= model
            raw["train"]["micro_batch_size"] = 1
        worker_pools(processes).run("tests.training.programs", "run_training", raw=raw)
        samples = (directory / "run" / "samples.jsonl").read_text()
        return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()], samples

    return measure


@pytest.fixture(scope="module")
def single(figures):
    return figures(1, {"zero": 0})


def test_blocks_add_up_to_the_model_and_layers_say_what_their_mixer_has(single):
    (unasked, asked), samples = single
    assert len(samples.splitlines()) == 2
    assert not [name for name in unasked if "/" in name or name == "update_ratio"]
    assert unasked["samples"] == 4 and asked["samples"] == 8 and asked["peak_memory_bytes"] > 1e7
    assert asked["model_flops_utilization"] == pytest.approx(asked["tflops_per_second"] / 0.5, rel=1e-12)
    norms = {name: value for name, value in asked.items() if name.startswith("grad_norm/")}
    assert set(norms) == {f"grad_norm/{block}" for block in (*(f"layers.{i}" for i in range(6)), "embedding", "head",
                                                             "output_norm")}  # fmt: skip
    assert math.sqrt(sum(value**2 for value in norms.values())) == pytest.approx(asked["grad_norm"], rel=1e-5)
    assert 1e-4 < asked["update_ratio"] < 1
    for layer, mixer in enumerate(RECURRENT):
        found = {name.split("/")[0] for name in asked if name.endswith(f"/layers.{layer}")}
        assert found == GATES[mixer] | {"state_norm", "largest_state", "grad_norm", "update_ratio"}
        assert 0 < asked[f"state_norm/layers.{layer}"] and 0 < asked[f"largest_state/layers.{layer}"]
        for gate in GATES[mixer] - {"log_input_gate"}:
            assert 0 < asked[f"{gate}/layers.{layer}"] < 1, (mixer, gate)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LAYOUTS]
)
def test_every_layout_measures_the_same(layout, figures, single):
    assert_same(figures(*LAYOUTS[layout]), single)


@pytest.fixture(scope="module")
def single_with_experts(figures):
    return figures(1, {"zero": 0}, EXPERTS)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in FAST_EXPERT else pytest.mark.slow) for name in EXPERT_LAYOUTS]
)
def test_blocks_of_experts_are_those_of_the_whole_model(layout, figures, single_with_experts):
    """A rank that holds some of a block's experts counts those, and no other rank does."""
    (_, expected), _ = single_with_experts
    norms = [value for name, value in expected.items() if name.startswith("grad_norm/")]
    assert math.sqrt(sum(value**2 for value in norms)) == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert "grad_norm/shared.router_cell" in expected
    assert_same(figures(*EXPERT_LAYOUTS[layout], EXPERTS), single_with_experts)


def assert_same(measured, single):
    ((_, found), written), ((_, expected), samples) = measured, single
    assert written == samples
    names = [name for name in expected if "/" in name or name == "update_ratio"]
    assert [name for name in found if "/" in name or name == "update_ratio"] == names
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-7), name


@pytest.mark.parametrize(
    ("length", "parallel"),
    [(33, {"context": 2}), (34, {"context": 2, "tensor": 2, "sequence": True}), (32, {"context": 3})],
)
def test_rows_that_do_not_divide_over_segments_are_refused(length, parallel, tmp_path):
    raw = raw_run(tmp_path, parallel, every=2)
    raw["data"]["sequence_length"] = length
    with pytest.raises(InputError, match=f"observe.states=true .* data.sequence_length={length} is not divisible by"):
        parse_config(raw, "test")
    raw["observe"]["states"] = False
    assert parse_config(raw, "test").observe.per_block


def test_gates_of_a_sequence_are_those_of_its_tokens_one_by_one(worker_pools):
    """The gates of sLSTM and of the Newton cells see the state before each token, which is found again for them."""
    (differences,) = worker_pools(1).run(PROGRAMS, "states_of_layers", case_names=[f"{name}-0" for name in RECURRENT])
    assert {name.split("-")[0] for name in differences} == set(RECURRENT)
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize(
    ("parameter", "block"),
    [
        ("layers.12.mixer.output.weight", "layers.12"),
        ("encoder.layers.0.channel.up.weight", "encoder.layers.0"),
        ("embedding.weight", "embedding"),
        ("shared.router_cell.weight", "shared.router_cell"),
    ],
)
def test_a_parameter_belongs_to_its_block(parameter, block):
    assert block_of(parameter) == block
