"""The decoder around the mixers: one model that holds a block of every registered mixer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pretrain.models.carried import initial_carried
from pretrain.models.decoder import IGNORED_LABEL, Decoder
from pretrain.models.mixer import Documents
from pretrain.models.mixer_config import AUXILIARY_LOSS
from pretrain.models.parameters import declared_parameters
from pretrain.models.registry import channel_mixers, sequence_mixers
from tests.conformance import programs, tools

HIDDEN_SIZE, VOCABULARY, LENGTH = 32, 72, 19

# float32; a model is several mixers deep, and each amplifies the rounding of those before it. Gradients of gate
# biases are small sums of large terms.
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-3


def model_section(soft_cap: float | None = 15.0) -> dict[str, Any]:
    """A block of each registered sequence mixer with the channel mixers in turn, and a block of each part alone."""
    channels = [family.config.examples(HIDDEN_SIZE)[0].model_dump() for family in channel_mixers().values()]
    mixers = [family.config.examples(HIDDEN_SIZE)[0].model_dump() for family in sequence_mixers().values()]
    blocks: dict[str, dict[str, Any]] = {
        f"both_{index}": {"mixer": mixer, "channel": channels[index % len(channels)]}
        for index, mixer in enumerate(mixers)
    }
    blocks |= {"mixer_alone": {"mixer": mixers[0]}, "channel_alone": {"channel": channels[-1]}}
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN_SIZE,
        # Twice the pattern, so that it divides into two pipeline stages.
        "num_layers": 2 * len(blocks),
        "layers": list(blocks),
        "blocks": blocks,
        "output_logit_soft_cap": soft_cap,
    }


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def training_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels (some left out), and starts of documents (one where the sequence begins, or not)."""
    tokens = random_tokens(2, LENGTH + 1)
    labels = tokens[:, 1:].clone()
    labels[0, 3:6] = IGNORED_LABEL
    labels[1, -1] = IGNORED_LABEL
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, [0, 7, 8]] = True
    starts[1, [5]] = True
    return tokens[:, :-1], labels, starts


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    decoder.zero_grad()
    decoder(*training_batch()).backward()
    return {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1] * LENGTH, [6, 1, 12]], ids=["tokens", "chunks"])
def test_logits_in_calls_that_hand_on_states_are_those_of_one_pass(lengths: list[int]) -> None:
    decoder = programs.decoder_of(model_section())
    tokens = random_tokens(2, LENGTH)
    whole, final = decoder.logits(tokens)
    assert whole.shape == (2, LENGTH, VOCABULARY) and whole.dtype == torch.float32
    parts, states = [], None
    for piece in tokens.split(lengths, dim=1):
        logits, states = decoder.logits(piece, states)
        parts.append(logits)
    tools.assert_close(torch.cat(parts, dim=1), whole, TOLERANCE, "logits")
    assert states.keys() == final.keys()
    assert len(final) == sum(block.mixer is not None for block in decoder.layers.values()) < len(decoder.layers)
    for layer, state in final.items():
        tools.assert_all_close(states[layer], state, TOLERANCE, f"state of layer {layer}")


@torch.no_grad()
def test_documents_in_one_sequence_are_documents_alone() -> None:
    decoder = programs.decoder_of(model_section())
    tokens, _, starts = training_batch()
    _, states = decoder.logits(random_tokens(2, 5, seed=1))
    packed, final = decoder.logits(tokens, states, starts)
    for row in range(2):
        edges = [0, *(int(position) for position in starts[row].nonzero() if position), LENGTH]
        for first, last in zip(edges, edges[1:], strict=False):
            own = {
                layer: {name: tensor[row : row + 1] for name, tensor in state.items()}
                for layer, state in states.items()
            }
            alone, end = decoder.logits(tokens[row : row + 1, first:last], None if starts[row, first] else own)
            tools.assert_close(packed[row : row + 1, first:last], alone, TOLERANCE, f"tokens {first} to {last}")
        for layer, state in end.items():
            declared = decoder.layers[layer].mixer.state_tensors()
            # Of a state that grows, more may be kept for a document that is not alone.
            known = {name: tensor for name, tensor in state.items() if None not in declared[name].shape}
            of_row = {name: final[layer][name][row : row + 1] for name in known}
            tools.assert_all_close(of_row, known, TOLERANCE, f"final state of layer {layer}")
        following = random_tokens(2, 6, seed=2)
        going_on, _ = decoder.logits(following, final)
        alone, _ = decoder.logits(following[row : row + 1], end)
        tools.assert_close(going_on[row : row + 1], alone, TOLERANCE, "tokens that follow")


@torch.no_grad()
def test_logits_depend_on_the_states_given() -> None:
    decoder = programs.decoder_of(model_section())
    tokens = random_tokens(1, 4)
    _, states = decoder.logits(random_tokens(1, 5, seed=1))
    without, _ = decoder.logits(tokens)
    for layer in states:
        withheld, _ = decoder.logits(tokens, {layer: states[layer]})
        assert (withheld - without).abs().max() > 1e-2, f"the state of layer {layer} changes nothing"


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_loss_is_the_cross_entropy_of_the_logits(soft_cap: float | None) -> None:
    decoder = programs.decoder_of(model_section(soft_cap))
    tokens, labels, starts = training_batch()
    with torch.no_grad():
        logits, _ = decoder.logits(tokens, document_starts=starts)
        loss = decoder(tokens, labels, starts)
    expected = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    # A sum of 34 float32 terms in another order.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (logits.abs().max() <= 2.0) == (soft_cap is not None)


def auxiliary_loss(decoder: Decoder, tokens: Tensor, labels: Tensor, starts: Tensor) -> Tensor:
    """What mixers add to the loss at the tokens whose labels count, in nats."""
    hidden = decoder._embed(tokens)
    carried = initial_carried(hidden, decoder.carried_channels)
    _, carried, _ = decoder._blocks(hidden, carried, None, Documents(starts), keep_states=False)
    return carried[AUXILIARY_LOSS].squeeze(-1).t()[labels != IGNORED_LABEL].sum()


def test_gradient_is_that_of_the_cross_entropy_of_the_logits_and_of_the_auxiliary_loss() -> None:
    decoder = programs.decoder_of(model_section())
    tokens, labels, starts = training_batch()
    found = gradients(decoder)
    logits, _ = decoder.logits(tokens, document_starts=starts)
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    loss = loss + auxiliary_loss(decoder, tokens, labels, starts)
    expected = tools.gradients(loss, decoder, {})
    tools.assert_every_parameter_matters(decoder, expected)
    tools.assert_all_close(found, expected, GRADIENT_TOLERANCE, "gradient")


def test_recomputed_blocks_have_identical_gradients() -> None:
    expected = gradients(programs.decoder_of(model_section()))
    decoder = programs.decoder_of(model_section(), recompute="block")
    calls: list[int] = []
    for layer, block in decoder.layers.items():
        block.register_forward_pre_hook(lambda *_, layer=layer: calls.append(int(layer)))
    found = gradients(decoder)
    assert sorted(calls) == sorted([*range(len(decoder.layers))] * 2), "each block runs forward twice"
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), f"the gradient of {name} differs"


def test_pipeline_stages_hold_the_parameters_of_one_model_between_them(worker_pools) -> None:
    model = model_section()
    whole = programs.parameter_names(model)
    stages = worker_pools(2).run("tests.conformance.programs", "parameter_names", model=model, pipeline=2)
    assert all(stages)
    assert stages[0] + stages[1] == whole


def test_built_on_the_meta_device_it_takes_no_memory() -> None:
    real = programs.decoder_of(model_section())
    with torch.device("meta"):
        decoder = Decoder(real.model, real.config)
    assert all(tensor.is_meta for tensor in (*decoder.parameters(), *decoder.buffers()))
    for (name, expected), (other, parameter) in zip(
        declared_parameters(real), declared_parameters(decoder), strict=True
    ):
        assert other == name and parameter.shape == expected.shape, name
