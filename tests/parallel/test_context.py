"""Sequences in segments over ranks: the steps of one process, whatever the mixers and wherever documents begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data.batch import IGNORED_LABEL
from pretrain.errors import InputError
from pretrain.plan import plan
from tests.configurations import every_mixer_model, tiny_config
from tests.parallel.programs import synthetic_batch
from tests.parallel.test_parity import LAYOUTS, PROGRAMS, STEPS, assert_same_run, with_small_input_gates


def every_sequence_mixer(repetitions: int) -> dict[str, Any]:
    """Every mixer in one model, with feed-forward layers where experts would be."""
    model = with_small_input_gates(every_mixer_model(64, repetitions))
    for block in model["blocks"].values():
        if block.get("channel", {}).get("type") == "moe":
            block["channel"] = {"type": "swiglu", "intermediate_size": 64}
    return model


# By the number of pipeline stages.
MODELS = {stages: every_sequence_mixer(repetitions=stages) for stages in (1, 2)}


@pytest.fixture(scope="module")
def one_process(worker_pools):
    cache: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def run(length: int, stages: int) -> list[dict[str, Any]]:
        if (length, stages) not in cache:
            overrides = sections({"model": MODELS[stages], "data": {"sequence_length": length}})
            cache[length, stages] = worker_pools(1).run(PROGRAMS, "train_steps", overrides=overrides, steps=STEPS)
        return cache[length, stages]

    return run


def sections(overrides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    data = {"source": {"type": "standard_library"}, "tokenizer": {"type": "bytes"}, "sequence_length": 16}
    return overrides | {"data": data | overrides.get("data", {})}


@pytest.mark.parametrize(
    ("layout", "scheme", "recompute", "length"),
    [
        ("context2_zero0", "auto", "none", 13),
        ("context4_zero1", "chain", "block", 13),
        ("context4_zero1", "scan", "none", 13),
        ("context4_zero1", "gather", "block", 16),
        ("context2_pipeline2_zero1", "gather", "none", 13),
        ("context2_tensor2_sequence_zero1", "scan", "block", 16),
    ],
)
def test_every_mixer_takes_the_steps_of_one_process(
    layout, scheme, recompute, length, worker_pools, one_process
) -> None:
    processes, parallel = LAYOUTS[layout]
    stages = parallel.get("pipeline", 1)
    parallel = parallel | {"context_scheme": scheme}
    # Two micro-batches; more of them than a pipeline has stages.
    train = {"recompute": recompute, "micro_batch_size": 4 if stages == 1 else 2}
    overrides = {"parallel": parallel, "model": MODELS[stages], "train": train, "data": {"sequence_length": length}}
    results = worker_pools(processes).run(PROGRAMS, "train_steps", overrides=sections(overrides), steps=STEPS)
    assert_same_run(results, one_process(length, stages), relative=1e-5, weights=5e-5)


def mixers_only(*blocks: dict[str, Any]) -> dict[str, Any]:
    named = {f"block{index}": block for index, block in enumerate(blocks)}
    return {"hidden_size": 32, "layers": list(named), "num_layers": len(named), "blocks": named}


@pytest.mark.parametrize(
    ("blocks", "context", "scheme"),
    [
        (({"mixer": {"type": "mamba2", "head_size": 16}}, {"channel": {"type": "mlp"}}), 2, "gather"),
        (({"mixer": {"type": "mamba2", "head_size": 16}},), 16, "scan"),
        (({"mixer": {"type": "mamba2", "head_size": 16}}, {"mixer": {"type": "slstm", "num_heads": 2}}), 2, "chain"),
    ],
)
def test_the_scheme_follows_from_the_mixers_and_the_ranks(blocks, context: int, scheme: str) -> None:
    config = tiny_config(
        **sections({"parallel": {"context": context}, "model": mixers_only(*blocks), "data": {"sequence_length": 256}})
    )
    assert config.context_scheme == scheme


@pytest.mark.parametrize(("length", "count", "multiple"), [(16, 4, 1), (13, 4, 1), (13, 2, 4), (3, 4, 1)])
def test_segments_are_the_row_and_padding_that_counts_for_nothing(length: int, count: int, multiple: int) -> None:
    batch = synthetic_batch([1, 2], length)
    parts = [batch.segment(index, count, multiple) for index in range(count)]
    assert len({part.tokens.shape for part in parts}) == 1 and parts[0].tokens.shape[1] % multiple == 0
    for name in ("tokens", "labels", "document_starts"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(joined[:, :length], getattr(batch, name)), name
    padding = torch.cat([part.labels for part in parts], dim=1)[:, length:]
    assert (padding == IGNORED_LABEL).all()
    assert torch.cat([part.document_starts for part in parts], dim=1)[:, length:].all()


def test_what_cannot_be_cut_is_refused() -> None:
    moe = {
        "mixer": {"type": "mamba2", "head_size": 16},
        "channel": {"type": "moe", "num_experts": 4, "intermediate_size": 16},
    }
    for blocks, settings, reason in (
        ((moe,), {"data": {"sequence_length": 13}}, "data.sequence_length=13 is not divisible by 2"),
        ((moe,), {"parallel": {"context_scheme": "chain"}}, r"wait for ever .* \(parallel.context_scheme=chain\)"),
        ((moe, {"mixer": {"type": "slstm", "num_heads": 2}}), {}, r"wait for ever .* \(slstm\)"),
    ):
        parallel = {"context": 2} | settings.get("parallel", {})
        given = sections(settings | {"model": mixers_only(*blocks), "parallel": parallel})
        with pytest.raises(InputError, match=f"context=2 does not go with the routed experts of .*{reason}"):
            tiny_config(**given)
    waiting = mixers_only({"mixer": {"type": "mamba2", "head_size": 16}}, {"mixer": {"type": "slstm", "num_heads": 2}})
    with pytest.raises(InputError, match="zero=2 does not go with parallel.context=2 .* its slstm layers wait"):
        tiny_config(parallel={"context": 2, "zero": 2, "context_scheme": "gather"}, model=waiting)
    with pytest.raises(InputError, match="with parallel.context_scheme=chain all layers wait for the state"):
        tiny_config(parallel={"context": 2, "zero": 3, "context_scheme": "chain"})
    convolution = mixers_only({"mixer": {"type": "mamba2", "head_size": 16}})
    short = sections({"parallel": {"context": 8}, "model": convolution, "data": {"sequence_length": 16}})
    with pytest.raises(InputError, match="data.sequence_length=16 over parallel.context=8 ranks leaves 2 tokens"):
        tiny_config(**short)


def test_a_plan_holds_a_segment_of_each_sequence() -> None:
    data = sections({"data": {"sequence_length": 1024}})
    whole, parts = (plan(tiny_config(parallel={"zero": 1, "data": 1, "context": size}, **data)) for size in (1, 4))
    assert (whole.world_size, parts.world_size) == (1, 4)
    assert parts.tokens_per_step == whole.tokens_per_step
    for part, share in (("activations", 4), ("optimizer_moments", 4), ("weights", 1)):
        assert parts.bytes_per_rank_by_part[part] == pytest.approx(whole.bytes_per_rank_by_part[part] / share, rel=0.02)


def test_a_plan_says_what_segments_send_each_other() -> None:
    mamba2 = {"mixer": {"type": "mamba2", "head_size": 16, "state_size": 8, "num_groups": 1, "expand": 2}}
    model = mixers_only(mamba2, {"channel": {"type": "mlp"}})
    settings = {"parallel": {"context": 4, "zero": 1}, "model": model, "data": {"sequence_length": 1024}}

    def planned(scheme: str, **train: Any):
        parallel = settings["parallel"] | {"context_scheme": scheme}
        return plan(tiny_config(**sections(settings | {"parallel": parallel, "train": train}))).context

    # Four heads of 16 x 8 numbers and a decay each; three inputs of 64 + 8 + 8 convolved channels.
    summary, window = 4 * (4 * 16 * 8 + 4), 4 * 3 * (64 + 8 + 8)
    gather, scan, chain = planned("gather"), planned("scan"), planned("chain")
    assert gather.segment_length == 256 and [layer.mixer for layer in gather.layers] == ["mamba2"]
    micro_batch = tiny_config().train.micro_batch_size
    for found, messages, size in (
        (gather, 2 * (3 + 12), 2 * (3 * window + 12 * summary)),
        # One message from each rank to the next, then over one and two ranks from the second on.
        (scan, 2 * (3 + 3 + 2 + 1), 2 * (3 * window + 6 * summary)),
        (chain, 2 * 3, 2 * 3 * (window + summary - 16)),
    ):
        assert found.layers[0].messages == messages / 4
        assert found.layers[0].bytes == pytest.approx(micro_batch * size / 4)
    again = planned("gather", recompute="block").layers[0]
    assert again.bytes == pytest.approx(1.5 * gather.layers[0].bytes)
    assert plan(tiny_config()).context is None
