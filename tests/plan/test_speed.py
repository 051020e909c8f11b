"""FLOPs by length, and how long plans say that a step takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pretrain.config import Config
from pretrain.plan import GPUS, model_flops_per_token, plan
from pretrain.plan.communication import Traffic
from pretrain.plan.estimate import stage_flops_per_token
from pretrain.plan.gpus import GPU
from pretrain.plan.layers import layer_costs
from pretrain.plan.lengths import flops_by_length
from pretrain.plan.speed import LINK_EFFICIENCY, bytes_per_second, step_seconds
from pretrain.plan.stages import pipeline_stages
from tests.plan.conftest import EVERY_FAMILY

Load = Callable[..., Config]
# Round figures: memory, FLOP/s, bytes/s of memory, of the node's link and of the network, GPUs of a node.
ROUND = GPU(80 * 2**30, 1e15, 1e12, 400e9, 50e9, 8, "round")


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_flops_by_length_add_up_to_those_of_the_plan(load: Load, family: str) -> None:
    config = load(f"runs/{family}_tiny.yaml")
    found = flops_by_length(config)
    for length, total in zip(found.lengths, found.totals, strict=True):
        other = load(f"runs/{family}_tiny.yaml", f"data.sequence_length={length}")
        assert total == pytest.approx(model_flops_per_token(other), rel=1e-9)


def test_attention_grows_with_the_length_and_recurrences_do_not(load: Load) -> None:
    found = flops_by_length(load("runs/bamba_tiny.yaml", "data.sequence_length=4096"))
    assert found.lengths == [1024, 4096, 16384, 65536]
    quarter, one, _, sixteen = found.along_the_sequence["attention"]
    assert (one / quarter, sixteen / one) == (pytest.approx(4, rel=1e-2), pytest.approx(16, rel=1e-2))
    assert len(set(found.along_the_sequence["mamba2"])) == 1
    assert "swiglu" not in found.along_the_sequence


def test_duration_follows_from_the_stated_utilisation(load: Load) -> None:
    config = load("runs/xlstm_7b.yaml")
    planned = plan(config, 128, "h100", utilization=0.3)
    rate = 0.3 * 128 * GPUS["h100"].peak_flops_per_second / planned.flops_per_token
    assert planned.speed.tokens_per_second == pytest.approx(rate)
    assert planned.speed.days == pytest.approx(planned.training_tokens / rate / 86400)
    assert planned.speed.gpu_hours == pytest.approx(planned.speed.days * 24 * 128)
    # Recomputation and what is sent come on top.
    assert planned.speed.tokens_per_second_unhidden < rate
    assert plan(config, 128).speed is None


def test_step_of_a_pipeline_by_hand(load: Load) -> None:
    config = load("quickstart.yaml", "parallel.pipeline=2", "parallel.zero=0", "train.micro_batch_size=1")
    last = pipeline_stages(config, layer_costs(config), 1)[1]
    traffic = [Traffic("pipeline", "send", "pipeline", 2, 3e9), Traffic("data", "all_reduce", "copies", 2, 5e9)]
    flops = stage_flops_per_token(last)
    step = step_seconds(last, flops, traffic, ROUND, 0.5)
    assert step.compute == pytest.approx(flops * 16 * config.data.sequence_length / 0.5e15)
    link = LINK_EFFICIENCY * 400e9
    assert step.communication == {"pipeline": pytest.approx(3e9 / link), "data": pytest.approx(5e9 / link)}
    # Sixteen micro-batches, one more to fill the pipeline; gradients are summed when it is empty.
    assert step.bubble == pytest.approx((step.compute + 3e9 / link) / 16)
    assert step.total == pytest.approx(step.compute + step.weights + step.bubble + 8e9 / link)
    # Sixteen times two passes of weights (read, cast, read) and a gradient (written, read, added), then AdamW.
    moved = 16 * last.parameters * (2 * 12 + 16) + 28 * last.parameters
    assert step.weights == pytest.approx(moved / 1e12)


def test_what_zero_3_sends_hides_behind_products(load: Load) -> None:
    config = load("quickstart.yaml", "parallel.zero=3")
    (stage,) = pipeline_stages(config, layer_costs(config), 2)
    flops = stage_flops_per_token(stage)
    little, much = (
        step_seconds(stage, flops, [Traffic("data", "all_gather", "copies", 2, size, overlaps=True)], ROUND, 0.5)
        for size in (1.0, 1e12)
    )
    assert little.communication == {} and little.hidden_communication > 0
    assert much.communication["data"] + much.compute == pytest.approx(0.5e12 / (LINK_EFFICIENCY * 400e9))


@pytest.mark.parametrize(
    ("tensor", "group", "collective", "ranks", "expected"),
    [
        (8, "tensor", "all_reduce", 8, 400e9),
        (16, "tensor", "all_reduce", 16, 400e9),
        # One rank of each node: its own adapter. Four of each node: four adapters.
        (8, "copies", "all_reduce", 4, 50e9),
        (2, "copies", "all_reduce", 16, 200e9),
        (2, "copies", "all_gather", 4, 400e9),
        (2, "pipeline", "send", 2, 50e9),
        # Four of sixteen are near; of what goes to fifteen others twelve parts leave the node.
        (2, "expert", "all_to_all", 16, 50e9 * 15 / 12),
    ],
)
def test_groups_over_nodes_are_as_fast_as_their_way_out(load: Load, tensor, group, collective, ranks, expected) -> None:
    config = load("quickstart.yaml", "model.blocks.mlstm.mixer.num_heads=16", f"parallel.tensor={tensor}")
    traffic = Traffic("data", collective, group, ranks, 1.0)
    assert bytes_per_second(traffic, config, 32, ROUND) == pytest.approx(LINK_EFFICIENCY * expected)


def test_memory_with_and_without_recomputation_and_of_saves(load: Load) -> None:
    kept = plan(load("runs/xlstm_7b.yaml", "train.recompute=none"), 128)
    again = plan(load("runs/xlstm_7b.yaml", "train.recompute=block"), 128)
    assert kept.bytes_per_rank_by_recompute == again.bytes_per_rank_by_recompute
    assert kept.bytes_per_rank_by_recompute == {"none": kept.bytes_per_rank, "block": again.bytes_per_rank}
    # No tensor is cut: the rank that writes the embedding writes a third of a moment's bytes for it alone.
    vocabulary = load("runs/xlstm_7b.yaml").model.vocab_size // 2 * 4096
    assert kept.save_host_bytes == 12 * vocabulary
    assert plan(load("quickstart.yaml"), 1).save_host_bytes == 12 * plan(load("quickstart.yaml"), 1).parameters
