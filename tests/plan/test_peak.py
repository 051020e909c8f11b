"""The most that a rank holds in an optimizer step, and when, as a plan says, against what torch holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pretrain.config import Config
from pretrain.plan import plan
from tests.plan.conftest import ONE_PROCESS
from tests.plan.peaks import most_held

# Norms as torch fuses them without a GPU; rows long enough that activations outweigh all else.
SETTINGS = ("model.norm=layer", "train.global_batch_size=2", "train.micro_batch_size=2", "data.sequence_length=128")

NARROW = ("model.hidden_size=32", "model.num_layers=16")
MANY_WORDS = ("model.hidden_size=64", "model.vocab_size=8192", "model.num_layers=2")
BY_CHUNKS = ("train.loss_chunk_size=96",)
BLOCK = "train.recompute=block"
BFLOAT16 = "train.precision=bfloat16"

# Of a family's tiny model: changes, and which moment of a step is the heaviest.
CASES = {
    "recurrence": ("mamba2", (), "the backward pass of layer 1, mamba2"),
    "recurrence_recomputed": ("mamba2", (BLOCK,), "the backward pass of layer 0, mamba2"),
    "two_micro_batches": ("mamba2", ("train.micro_batch_size=1",), "the backward pass of layer 1, mamba2"),
    "few_tokens": ("mamba2", ("data.sequence_length=16",), "the optimizer's step"),
    "experts": ("hybrid_moe", (), "the head's backward pass"),
    "experts_recomputed": ("hybrid_moe", (BLOCK,), "the backward pass of layer 1, moe"),
    "words": ("hat", (), "the backward pass of hierarchy.decoder, mlstm_pre_up"),
    "words_recomputed": ("hat", (BLOCK,), "the backward pass of hierarchy.encoder, mlstm_pre_up"),
    "chunks": ("hnet_1stage", (), "the head's backward pass"),
    "chunks_recomputed": ("hnet_2stage", (BLOCK,), "the backward pass of layer 0, swiglu"),
    "large_vocabulary": ("xlstm", (*MANY_WORDS, BLOCK), "the loss"),
    "large_vocabulary_uncapped": ("xlstm", (*MANY_WORDS, BFLOAT16, "model.output_logit_soft_cap=null"), "the loss"),
    "loss_by_chunks": ("xlstm", (*MANY_WORDS, *BY_CHUNKS, BLOCK), "the head's backward pass"),
    "loss_by_chunks_uncapped": (
        "xlstm",
        (*MANY_WORDS, *BY_CHUNKS, BFLOAT16, "model.output_logit_soft_cap=null"),
        "the head's backward pass",
    ),
    "loss_by_chunks_uncapped_float32": (
        "xlstm",
        (*MANY_WORDS, *BY_CHUNKS, "model.output_logit_soft_cap=null"),
        "the loss",
    ),
    "deep_and_narrow": ("xlstm", NARROW, "the loss"),
    "deep_and_narrow_recomputed": ("xlstm", (*NARROW, BLOCK), "the backward pass of layer 0, swiglu"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_within_a_twentieth_of_what_is_planned(load: Callable[..., Config], case: str) -> None:
    family, changes, moment = CASES[case]
    held, config = most_held(load(f"runs/{family}_tiny.yaml", *ONE_PROCESS, *SETTINGS, *changes))
    planned = plan(config, 1)
    assert held == pytest.approx(planned.bytes_per_rank, rel=0.05)
    assert planned.heaviest_moment == moment


SWIGLU = {"type": "swiglu"}
MOE = {"type": "moe", "num_experts": 4, "experts_per_token": 2, "intermediate_size": 128}
# Every kind of message: a window and a summary, keys and values, a state that the next rank waits for.
SEGMENTS = {
    "exchanged": [{"type": "mamba2", "head_size": 16, "state_size": 16}, {"type": "attention", "num_heads": 4}],
    "waited_for": [{"type": "mlstm", "num_heads": 4}, {"type": "slstm", "num_heads": 4}],
}


@pytest.mark.parametrize(
    ("mixers", "parallel", "recompute"),
    [
        ("exchanged", {"context": 2}, "none"),
        ("exchanged", {"context": 2}, "block"),
        ("waited_for", {"context": 2}, "none"),
        ("exchanged", {"zero": 1}, "none"),
        ("exchanged", {"zero": 2}, "none"),
        ("exchanged", {"zero": 3}, "block"),
        ("exchanged", {"pipeline": 2}, "none"),
        ("exchanged", {"tensor": 2, "sequence": True}, "none"),
        ("exchanged", {"expert": 2}, "none"),
        ("exchanged", {"expert": 2, "zero": 1}, "block"),
    ],
)
def test_two_ranks_hold_within_a_tenth(
    mixers: str, parallel: dict[str, int], recompute: str, worker_pools: Any
) -> None:
    channel = MOE if "expert" in parallel else SWIGLU
    blocks: dict[str, Any] = {mixer["type"]: {"mixer": mixer, "channel": channel} for mixer in SEGMENTS[mixers]}
    overrides = {
        "model": {"hidden_size": 64, "num_layers": 2, "layers": list(blocks), "blocks": blocks, "norm": "layer"},
        "parallel": {"zero": 0} | parallel,
        "data": {"sequence_length": 256},
        "train": {"global_batch_size": 2, "micro_batch_size": 1, "recompute": recompute},
    }
    overrides["model"]["vocab_size"] = 264
    found = worker_pools(2).run("tests.plan.programs", "held_and_planned", overrides=overrides)
    most = max(held for held, _ in found)
    assert most == pytest.approx(found[0][1], rel=0.1)
