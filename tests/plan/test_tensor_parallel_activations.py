"""What tensor-parallel ranks keep of a mixture of experts: its inner channels are split, its router is not."""

from __future__ import annotations

from typing import Any

import pytest

HIDDEN = 64
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"zero": 0},
    "tensor2": {"tensor": 2, "zero": 0},
    "tensor2_sequence": {"tensor": 2, "sequence": True, "zero": 0},
}
CHANNELS: dict[str, dict[str, Any]] = {
    "recurrent": {"router": "recurrent", "router_size": 48},
    "linear_shared": {"router": "linear", "shared_expert_size": 96, "z_coefficient": 0.0, "experts_per_token": 1},
}


def _model(channel: str) -> dict[str, Any]:
    section = {"type": "moe", "num_experts": 8, "intermediate_size": 32, **CHANNELS[channel]}
    return {"hidden_size": HIDDEN, "num_layers": 1, "layers": ["experts"], "blocks": {"experts": {"channel": section}}}


@pytest.mark.parametrize(("channel", "precision"), [("recurrent", "bfloat16"), ("linear_shared", "float32")])
def test_plan_counts_what_a_rank_keeps(channel: str, precision: str, worker_pools) -> None:
    kept, planned = {}, {}
    for name, parallel in LAYOUTS.items():
        found = worker_pools(parallel.get("tensor", 1)).run(
            "tests.plan.programs", "kept_and_planned", model=_model(channel), parallel=parallel, precision=precision
        )
        assert len(set(found)) == 1, "ranks keep different amounts"
        kept[name], planned[name] = found[0]
    # Beyond the plan one process without a GPU keeps what its norm does, per position that a rank holds.
    beyond = kept["one"] - planned["one"]
    assert 0 < beyond < 8 * HIDDEN
    assert kept["tensor2"] == planned["tensor2"] + beyond
    assert kept["tensor2_sequence"] == planned["tensor2_sequence"] + beyond / 2
    assert planned["one"] > planned["tensor2"] > planned["tensor2_sequence"] > planned["one"] / 2
