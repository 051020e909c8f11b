"""Steps that hand on their states are one long sequence, but for the gradient, which stays within a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from data.batch import IGNORED_LABEL
from pretrain.config.carried_states import bytes_after_any_length
from pretrain.models.decoder import Decoder
from pretrain.models.registry import channel_mixers, sequence_mixers
from pretrain.models.states_between_steps import StatesBetweenSteps
from tests.conformance import programs

HIDDEN_SIZE, VOCABULARY, STEPS, LENGTH, ROWS, MICRO_BATCHES = 32, 72, 3, 7, 2, 2


def model_section(*channel_names: str) -> dict[str, Any]:
    """Every form of every sequence mixer whose state is bounded, with these channel mixers in turn."""
    mixers = [
        config.model_dump()
        for family in sequence_mixers().values()
        for config in family.config.examples(HIDDEN_SIZE)
        if bytes_after_any_length(config, HIDDEN_SIZE, 1) is not None
    ]
    assert len(mixers) > len(sequence_mixers())
    # A window of one token keeps no keys.
    mixers.append({"type": "attention", "num_heads": 2, "sliding_window": 1})
    channels = [channel_mixers()[name].config.examples(HIDDEN_SIZE)[0].model_dump() for name in channel_names]
    blocks = {
        f"block_{index}": {"mixer": mixer, "channel": channels[index % len(channels)]}
        for index, mixer in enumerate(mixers)
    }
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN_SIZE, "num_layers": len(blocks)}
    return sizes | {"layers": list(blocks), "blocks": blocks, "output_logit_soft_cap": None}


def long_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and document starts of all steps in one: ``(rows of all micro-batches, STEPS * LENGTH)``."""
    generator = torch.Generator().manual_seed(3)
    shape = (ROWS * MICRO_BATCHES, STEPS * LENGTH)
    tokens = torch.randint(0, VOCABULARY, (shape[0], shape[1] + 1), generator=generator)
    starts = torch.rand(shape, generator=generator) < 0.1
    starts[:, 0] = True
    # Where a step begins, some documents begin, and others go on.
    starts[:, LENGTH] = torch.tensor([True, False, False, True])
    starts[:, 2 * LENGTH] = False
    labels = tokens[:, 1:].clone()
    labels[torch.rand(shape, generator=generator) < 0.1] = IGNORED_LABEL
    return tokens[:, :-1], labels, starts


def step_of(step: int) -> list[tuple[Tensor, ...]]:
    """The micro-batches of one step."""
    parts = [tensor[:, step * LENGTH : (step + 1) * LENGTH].split(ROWS) for tensor in long_rows()]
    return list(zip(*parts, strict=True))


def run_step(decoder: Decoder, step: int, keep: bool = True, train: bool = True) -> Tensor:
    """Summed loss of one step as the schedule calls the decoder."""
    micro_batches = step_of(step)
    decoder.prepare_batch(decoder, micro_batches, 1.0, train)
    loss = torch.stack([decoder(*batch) for batch in micro_batches]).sum()
    if train:
        assert decoder.between_steps.are_finite()
        decoder.between_steps.finish(keep)
    return loss


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return programs.decoder_of(model_section(*channel_mixers()))


@pytest.fixture
def carrying(decoder: Decoder) -> Iterator[Decoder]:
    decoder.between_steps = StatesBetweenSteps()
    yield decoder
    decoder.between_steps = None


@torch.no_grad()
def test_steps_at_fixed_weights_are_one_sequence(carrying: Decoder) -> None:
    losses = [run_step(carrying, step).item() for step in range(STEPS)]
    carrying.between_steps = None
    whole = carrying(*long_rows()).item()
    assert sum(losses) == pytest.approx(whole, rel=1e-5)
    alone = sum(carrying(*batch).item() for step in range(STEPS) for batch in step_of(step))
    assert abs(alone - whole) > 1e-3 * whole, "states change nothing here"


def test_gradients_are_those_of_a_step_whose_states_are_constants() -> None:
    # Without routers, which add losses of their own to the gradient.
    decoder = programs.decoder_of(model_section("swiglu", "mlp"))
    decoder.between_steps = StatesBetweenSteps()
    run_step(decoder, 0).backward()
    before = decoder.between_steps.states
    assert not any(tensor.requires_grad for tensor in states_of(decoder))
    decoder.zero_grad()
    run_step(decoder, 1).backward()
    found = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    for (tokens, labels, starts), states in zip(step_of(1), before, strict=True):
        logits, _ = decoder.logits(tokens, states, starts)
        functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    assert found.keys() == dict(decoder.named_parameters()).keys()
    for name, parameter in decoder.named_parameters():
        # The queries of a window of one token have no gradient but rounding.
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            found[name],
            parameter.grad,
            rtol=0,
            atol=1e-4 * largest + 1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def states_of(decoder: Decoder) -> list[Tensor]:
    states = decoder.between_steps.states
    return [tensor.clone() for of_batch in states for state in of_batch.values() for tensor in state.values()]


@torch.no_grad()
def test_evaluations_and_skipped_steps_leave_states_alone(carrying: Decoder) -> None:
    fresh = run_step(carrying, 1, train=False)
    run_step(carrying, 0)
    kept = states_of(carrying)
    assert torch.equal(run_step(carrying, 1, train=False), fresh)
    skipped = run_step(carrying, 1, keep=False)
    assert skipped != fresh
    assert all(torch.equal(*pair) for pair in zip(states_of(carrying), kept, strict=True))
    assert torch.equal(run_step(carrying, 1), skipped)
    assert not all(torch.equal(*pair) for pair in zip(states_of(carrying), kept, strict=True))


def test_a_state_that_is_not_finite_is_seen() -> None:
    between = StatesBetweenSteps()
    between.begin(train=True)
    assert between.are_finite()
    between.take({"0": {"level": torch.ones(2, 3)}})
    assert between.are_finite()
    between.take({"0": {"level": torch.tensor([[1.0, float("inf"), 0.0]])}})
    assert not between.are_finite()
    between.finish(keep=False)
    assert between.states is None and between.are_finite()


def test_a_kept_state_is_a_copy() -> None:
    between, wide = StatesBetweenSteps(), torch.arange(12.0).reshape(3, 4)
    between.begin(train=True)
    between.take({"0": {"window": wide[:, 2:]}})
    between.finish(keep=True)
    kept = between.states[0]["0"]["window"]
    wide.zero_()
    assert kept.tolist() == [[2, 3], [6, 7], [10, 11]] and kept.untyped_storage().nbytes() == 24
