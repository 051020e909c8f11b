"""Mixtures of experts take the same steps in every layout, wherever experts, layers and router states are."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.test_parity import PROGRAMS, STEPS, assert_same_run

MIXER = {"type": "mlstm", "num_heads": 2, "chunk_size": 8}
ROUTED = {"type": "moe", "num_experts": 4, "intermediate_size": 24, "router_size": 8}
# Recurrent routers and linear ones, a shared expert, layers that only hand on; losses large enough to be missed.
MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 4,
    "layers": ["recurrent", "dense", "linear", "shared"],
    "blocks": {
        "recurrent": {"mixer": MIXER, "channel": ROUTED | {"balance_coefficient": 0.05, "z_coefficient": 0.02}},
        "dense": {"mixer": MIXER, "channel": {"type": "swiglu", "intermediate_size": 32}},
        "linear": {"channel": ROUTED | {"router": "linear", "balance_coefficient": 0.1, "z_coefficient": 0.0}},
        "shared": {
            "mixer": MIXER,
            "channel": ROUTED | {"experts_per_token": 1, "shared_expert_size": 16, "z_coefficient": 0.05},
        },
    },
}

# (processes, parallel section)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (1, {"zero": 1}),
    "tensor2": (2, {"tensor": 2, "zero": 0}),
    "tensor2_sequence_zero1": (2, {"tensor": 2, "sequence": True, "zero": 1}),
    "pipeline2_zero0": (2, {"pipeline": 2, "zero": 0}),
    "pipeline4_zero1": (4, {"pipeline": 4, "zero": 1}),
    "data2_zero1": (2, {"zero": 1}),
    "data2_zero2": (2, {"zero": 2}),
    "data2_zero3": (2, {"zero": 3}),
    "expert2_zero0": (2, {"expert": 2, "zero": 0}),
    "expert2_zero1": (2, {"expert": 2, "zero": 1}),
    "expert2_zero2": (2, {"expert": 2, "zero": 2}),
    "expert4_zero1": (4, {"expert": 4, "zero": 1}),
    "expert2_data4_zero0": (4, {"expert": 2, "zero": 0}),
    "expert2_data4_zero1": (4, {"expert": 2, "zero": 1}),
    "expert2_data4_zero2": (4, {"expert": 2, "zero": 2}),
    "expert2_tensor2_zero1": (4, {"expert": 2, "tensor": 2, "zero": 1}),
    "expert2_tensor2_sequence_zero0": (4, {"expert": 2, "tensor": 2, "sequence": True, "zero": 0}),
    "expert2_tensor2_sequence_zero2": (4, {"expert": 2, "tensor": 2, "sequence": True, "zero": 2}),
    "expert2_pipeline2_zero1": (4, {"expert": 2, "pipeline": 2, "zero": 1}),
    "context2_expert2_zero2": (4, {"context": 2, "expert": 2, "zero": 2}),
}
RECOMPUTED = [
    "context2_expert2_zero2",
    "pipeline2_zero0",
    "data2_zero3",
    "expert2_tensor2_sequence_zero2",
    "expert2_pipeline2_zero1",
]


@pytest.fixture(scope="module")
def one_process(worker_pools) -> list[dict[str, Any]]:
    return worker_pools(1).run(PROGRAMS, "train_steps", overrides={"model": MODEL}, steps=STEPS)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [(layout, "none") for layout in LAYOUTS] + [(layout, "block") for layout in RECOMPUTED],
)
def test_same_as_one_process(layout, recompute, worker_pools, one_process) -> None:
    processes, parallel = LAYOUTS[layout]
    overrides = {"parallel": parallel, "model": MODEL, "train": {"recompute": recompute}}
    results = worker_pools(processes).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)
    assert_same_run(results, one_process, relative=1e-5, weights=5e-5)


@pytest.mark.parametrize("layout", ["expert2_tensor2_sequence_zero2", "expert2_pipeline2_zero1"])
def test_bfloat16_stays_close_to_one_process(layout, worker_pools) -> None:
    """Routers compute in float32 whatever the rest does; hidden states that differ by rounding may still change a
    token's second expert."""
    processes, parallel = LAYOUTS[layout]
    train = {"precision": "bfloat16"}
    alone = worker_pools(1).run(PROGRAMS, "train_steps", overrides={"model": MODEL, "train": train}, steps=STEPS)
    overrides = {"parallel": parallel, "model": MODEL, "train": train}
    results = worker_pools(processes).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)
    for (loss, norm, applied), (loss_one, norm_one, _) in zip(
        results[0]["trajectory"], alone[0]["trajectory"], strict=True
    ):
        assert applied
        assert loss == pytest.approx(loss_one, rel=2e-3)
        assert norm == pytest.approx(norm_one, rel=3e-2)
