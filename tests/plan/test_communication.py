"""What plans say that ranks send, against the calls of a step that send it."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.plan.communication import Traffic
from tests.configurations import every_mixer_model

MOE = {
    "type": "moe",
    "num_experts": 4,
    "intermediate_size": 32,
    "router_size": 16,
    "balance_coefficient": 0.1,
    "shared_expert_size": 16,
}
EXPERTS: dict[str, Any] = {
    "num_layers": 2,
    "layers": ["mlstm"],
    "blocks": {"mlstm": {"mixer": {"type": "mlstm", "num_heads": 4, "chunk_size": 8}, "channel": MOE}},
}
EVERY_MIXER = every_mixer_model(64)
EVERY_MIXER["num_layers"] //= 2
SMALL = {"num_layers": 2}


def _counted_and_planned(pool: Any, parallel: dict[str, Any], model: dict[str, Any], **options: Any) -> list[Any]:
    gathers_always = options.pop("gathers_always", False)
    overrides = {"parallel": parallel, "model": model, "train": options}
    return pool.run("tests.plan.counting", "counted_and_planned", overrides=overrides, gathers_always=gathers_always)


@pytest.mark.parametrize(
    ("processes", "parallel", "model", "options"),
    [
        (2, {"tensor": 2, "zero": 0}, SMALL, {"recompute": "block", "precision": "bfloat16"}),
        (2, {"tensor": 2, "sequence": True, "zero": 0}, SMALL, {"recompute": "block"}),
        (2, {"pipeline": 2, "zero": 0}, SMALL | {"tie_embeddings": True}, {"precision": "bfloat16"}),
        # What is carried from layer to layer goes on to the next stage, and stages share the router's cell.
        (2, {"pipeline": 2, "zero": 1}, EXPERTS, {"precision": "bfloat16"}),
        (2, {"zero": 0}, SMALL, {}),
        (2, {"zero": 1}, SMALL, {}),
        (2, {"zero": 2}, SMALL, {}),
        (2, {"zero": 3}, SMALL, {"gathers_always": True}),
        (4, {"tensor": 2, "sequence": True, "zero": 2}, SMALL, {}),
    ],
)
def test_bytes_are_those_of_the_calls(processes, parallel, model, options, worker_pools) -> None:
    for counted, planned in _counted_and_planned(worker_pools(processes), parallel, model, **options):
        assert counted and counted == planned


def test_zero_3_gathers_small_parameters_once(worker_pools) -> None:
    """Parameters of less than the 32 bytes that are counted, here biases of four heads, are missing."""
    for counted, planned in _counted_and_planned(worker_pools(2), {"zero": 3}, SMALL):
        assert counted.keys() == planned.keys()
        assert counted["copies", "all_gather"] == planned["copies", "all_gather"] - SMALL["num_layers"] * 2 * 4 * 4


@pytest.mark.parametrize("sequence", [False, True])
def test_every_mixer_says_what_it_sends_to_tensor_parallel_ranks(sequence, worker_pools) -> None:
    """But for how often a sequence chose each expert, some bytes that are not planned."""
    parallel = {"tensor": 2, "sequence": sequence, "zero": 0}
    for counted, planned in _counted_and_planned(worker_pools(2), parallel, EVERY_MIXER):
        assert counted.keys() == planned.keys()
        for call, size in planned.items():
            assert counted[call] == pytest.approx(size, abs=512), call


def test_experts_get_their_rows_from_all_ranks(worker_pools) -> None:
    """Which rank gets more is the router's choice; all together they get what is planned, and how many rows come."""
    model = EXPERTS | {"output_logit_soft_cap": None}
    ranks = _counted_and_planned(worker_pools(2), {"expert": 2, "zero": 1}, model)
    for counted, planned in ranks:
        assert counted.keys() == planned.keys()
        assert counted["copies", "all_reduce"] == planned["copies", "all_reduce"]
        # Experts of which no token chose any have no gradient, and nothing is sent for them.
        assert 0 < counted["copies", "all_gather"] == planned["copies", "all_gather"]
    counted, planned = (sum(rank[side]["expert", "all_to_all"] for rank in ranks) for side in (0, 1))
    micro_batches, layers = 2, 2
    assert counted == planned + 2 * micro_batches * layers * MOE["num_experts"] * 8


def test_shares_of_collectives() -> None:
    """Among four ranks: a sum is scattered and gathered, three quarters each; a message goes once."""
    sent = {name: Traffic("tensor", name, "tensor", 4, 64.0).sent for name in ("all_reduce", "all_gather", "send")}
    assert sent == {"all_reduce": 96.0, "all_gather": 48.0, "send": 64.0}
