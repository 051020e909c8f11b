"""Every layout takes the same steps as one process: loss, gradient norm and weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.configurations import every_mixer_model
from tests.parallel.programs import assemble

PROGRAMS = "tests.parallel.programs"
# The second begins with the weights, moments and buffers that the first left.
STEPS = 2

# (processes, parallel section)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (1, {"zero": 1}),
    "tensor2": (2, {"tensor": 2, "zero": 0}),
    "tensor2_zero1": (2, {"tensor": 2, "zero": 1}),
    "tensor2_sequence": (2, {"tensor": 2, "sequence": True, "zero": 0}),
    "tensor2_sequence_zero1": (2, {"tensor": 2, "sequence": True, "zero": 1}),
    "pipeline2_zero0": (2, {"pipeline": 2, "zero": 0}),
    "pipeline2_zero1": (2, {"pipeline": 2, "zero": 1}),
    "data2_zero0": (2, {"zero": 0}),
    "data2_zero1": (2, {"zero": 1}),
    "data2_zero2": (2, {"zero": 2}),
    "data2_zero3": (2, {"zero": 3}),
    "tensor2_pipeline2_sequence_zero0": (4, {"tensor": 2, "pipeline": 2, "sequence": True, "zero": 0}),
    "tensor2_pipeline2_sequence_zero1": (4, {"tensor": 2, "pipeline": 2, "sequence": True, "zero": 1}),
    "pipeline2_data2_zero1": (4, {"pipeline": 2, "zero": 1}),
    "pipeline4_zero1": (4, {"pipeline": 4, "zero": 1}),
    "pipeline2_uneven_zero1": (2, {"pipeline": 2, "layers_per_stage": [1, 3], "zero": 1}),
    "tensor2_data2_zero1": (4, {"tensor": 2, "zero": 1}),
    "tensor2_data2_sequence_zero2": (4, {"tensor": 2, "sequence": True, "zero": 2}),
    "tensor2_data2_zero3": (4, {"tensor": 2, "zero": 3}),
    "tensor2_data2_sequence_zero3": (4, {"tensor": 2, "sequence": True, "zero": 3}),
    "context2_zero0": (2, {"context": 2, "zero": 0}),
    "context2_zero1": (2, {"context": 2, "zero": 1}),
    "context2_zero3": (2, {"context": 2, "zero": 3}),
    "context4_zero1": (4, {"context": 4, "zero": 1}),
    "context2_data2_zero1": (4, {"context": 2, "zero": 1}),
    "context2_pipeline2_zero1": (4, {"context": 2, "pipeline": 2, "zero": 1}),
    "context2_tensor2_sequence_zero1": (4, {"context": 2, "tensor": 2, "sequence": True, "zero": 1}),
}
TENSOR4 = (4, {"tensor": 4, "sequence": True, "zero": 0})


def with_small_input_gates(model: dict[str, Any]) -> dict[str, Any]:
    """As models are trained: with large input gates the cell's normaliser nearly cancels and multiplies rounding."""
    for block in model["blocks"].values():
        if "input_gate_bias" in block.get("mixer", {}):
            block["mixer"]["input_gate_bias"] = -10.0
    return model


# Beside the tiny model: what a layout must treat in its own way.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "tied_embeddings": {"tie_embeddings": True, "norm": "layer"},
    # Two ranks hold 129 rows each, four 65: the last ones end in padding.
    "uneven_vocabulary": {"vocab_size": 257},
    "uneven_tied_vocabulary": {"vocab_size": 257, "tie_embeddings": True},
    "every_mixer": with_small_input_gates(every_mixer_model(64, repetitions=1)),
    "every_mixer_twice": with_small_input_gates(every_mixer_model(64)),
}


@pytest.fixture(scope="module")
def one_process(worker_pools):
    cache: dict[str, list[dict[str, Any]]] = {}

    def run(precision: str = "float32", model: str = "tiny") -> list[dict[str, Any]]:
        key = f"{precision} {model}"
        if key not in cache:
            overrides = {"train": {"precision": precision}, "model": MODELS[model]}
            cache[key] = worker_pools(1).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)
        return cache[key]

    return run


def assert_same_run(results, reference, relative: float, weights: float) -> None:
    expected = reference[0]["trajectory"]
    for result in results:
        for (loss, norm, applied), (loss_one, norm_one, _) in zip(result["trajectory"], expected, strict=True):
            assert applied
            assert loss == pytest.approx(loss_one, rel=relative)
            assert norm == pytest.approx(norm_one, rel=relative)
    whole, whole_one = assemble(results), assemble(reference)
    assert whole.keys() == whole_one.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(value, whole_one[name], atol=weights, rtol=0, err_msg=name)


RECOMPUTED = ["zero1", "tensor2_sequence_zero1", "tensor2_pipeline2_sequence_zero1", "data2_zero2", "data2_zero3"]


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [(layout, "none") for layout in LAYOUTS] + [(layout, "block") for layout in RECOMPUTED],
)
def test_same_as_one_process(layout, recompute, worker_pools, one_process):
    processes, parallel = LAYOUTS[layout]
    overrides = {"parallel": parallel, "train": {"recompute": recompute}}
    results = worker_pools(processes).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)
    # float32: sums in another order differ by about 1e-6 after some steps; a missing all-reduce by 1e-3.
    assert_same_run(results, one_process(), relative=1e-5, weights=5e-5)


@pytest.mark.parametrize(
    "layout",
    ["tensor2", "pipeline2_zero0", "pipeline4_zero1", "data2_zero3", "tensor2_pipeline2_sequence_zero1"],
)
def test_tied_embeddings_are_one_parameter_in_every_layout(layout, worker_pools, one_process):
    processes, parallel = LAYOUTS[layout]
    overrides = {"parallel": parallel, "model": MODELS["tied_embeddings"]}
    results = worker_pools(processes).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)
    assert_same_run(results, one_process(model="tied_embeddings"), relative=1e-5, weights=5e-5)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("uneven_vocabulary", TENSOR4),
        ("uneven_vocabulary", LAYOUTS["tensor2_data2_zero3"]),
        ("uneven_tied_vocabulary", LAYOUTS["tensor2_pipeline2_sequence_zero1"]),
    ],
)
def test_a_vocabulary_that_does_not_divide(model, layout, worker_pools, one_process):
    processes, parallel = layout
    overrides = {"parallel": parallel, "model": MODELS[model]}
    results = worker_pools(processes).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)
    assert_same_run(results, one_process(model=model), relative=1e-5, weights=5e-5)


@pytest.mark.parametrize(
    ("layout", "recompute", "micro_batch_size"),
    [
        ("tensor2", "none", 4),
        ("tensor2_sequence_zero1", "block", 4),
        ("pipeline2_zero1", "none", 2),
        ("data2_zero2", "none", 2),
        ("data2_zero3", "block", 2),
        ("tensor2_pipeline2_sequence_zero1", "none", 2),
    ],
)
def test_every_mixer_in_one_model(layout, recompute, micro_batch_size, worker_pools, one_process):
    processes, parallel = LAYOUTS[layout]
    model = "every_mixer_twice" if "pipeline" in parallel else "every_mixer"
    train = {"recompute": recompute, "micro_batch_size": micro_batch_size}
    overrides = {"parallel": parallel, "model": MODELS[model], "train": train}
    results = worker_pools(processes).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)
    assert_same_run(results, one_process(model=model), relative=1e-5, weights=5e-5)


@pytest.mark.parametrize("model", ["uneven_vocabulary", "uneven_tied_vocabulary"])
@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        ("zero1", "none"),
        ("tensor2", "none"),
        ("data2_zero3", "block"),
        ("tensor2_pipeline2_sequence_zero1", "none"),
        ("tensor2_data2_sequence_zero3", "none"),
    ],
)
def test_a_loss_by_chunks_is_the_loss(layout, recompute, model, worker_pools, one_process):
    processes, parallel = LAYOUTS[layout]
    # Micro-batches are of 32 positions.
    train = {"loss_chunk_size": 7, "recompute": recompute}
    overrides = {"parallel": parallel, "model": MODELS[model], "train": train}
    results = worker_pools(processes).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)
    assert_same_run(results, one_process(model=model), relative=1e-5, weights=5e-5)


@pytest.mark.parametrize("layout", ["tensor2_sequence_zero1", "pipeline2_zero1", "data2_zero3", "data2_zero0"])
def test_bfloat16_stays_close_to_one_process(layout, worker_pools, one_process):
    processes, parallel = LAYOUTS[layout]
    overrides = {"parallel": parallel, "train": {"precision": "bfloat16"}}
    results = worker_pools(processes).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)
    # bfloat16 keeps 8 bits: single roundings are 4e-3, and their sums over a step average out below that.
    reference = one_process("bfloat16")
    for (loss, norm, _), (loss_one, norm_one, _) in zip(
        results[0]["trajectory"], reference[0]["trajectory"], strict=True
    ):
        assert loss == pytest.approx(loss_one, rel=1e-3)
        assert norm == pytest.approx(norm_one, rel=2e-2)


def test_bfloat16_is_close_to_float32(one_process):
    for (loss, norm, _), (loss_one, norm_one, _) in zip(
        one_process("bfloat16")[0]["trajectory"], one_process()[0]["trajectory"], strict=True
    ):
        assert loss == pytest.approx(loss_one, rel=2e-3)
        assert norm == pytest.approx(norm_one, rel=3e-2)
