"""HAT in pieces: any cutting of a text into calls that hand on the state gives what one call, and training, gives."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from pretrain.models.hierarchy.hat.model import HAT
from pretrain.models.hierarchy.hat.words import WordSums, sum_words
from pretrain.models.mixer import State
from pretrain.models.states import join_rows, select_rows
from tests.models.hat_models import random_hat, random_words
from tests.models.test_hat import READ, logits_of, random_bytes
from tests.models.test_hnet import first_only

LENGTH, BATCH = 40, 2
BACKBONES = pytest.mark.parametrize(
    "layers", [["mlstm", "attention"], ["attention"], ["mamba2", "mlstm"]], ids="+".join
)
WINDOW = 6


def packed(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, starts of documents, which begin at different places in each row, and starts of words."""
    tokens = random_bytes(BATCH, LENGTH, seed)
    starts = first_only(tokens)
    starts[0, [9, 10, 29]] = starts[1, 22] = True
    return tokens, starts, random_words(starts, seed)


def in_pieces(
    model: HAT, tokens: Tensor, starts: Tensor, words: Tensor, lengths: list[int]
) -> tuple[Tensor, dict[str, State]]:
    logits, states = [], None
    pieces = zip(*(tensor.split(lengths, 1) for tensor in (tokens, starts, words)), strict=True)
    for piece, piece_starts, piece_words in pieces:
        found, states = model.logits(piece, states, piece_starts, piece_words)
        logits.append(found)
    return torch.cat(logits, 1), states


def random_lengths(seed: int) -> list[int]:
    source, lengths = random.Random(seed), []
    while (rest := LENGTH - sum(lengths)) > 0:
        lengths.append(min(source.choice([1, 1, 2, 3, 7, 12]), rest))
    return lengths


def counting(state: State, name: str, row: int) -> Tensor:
    """What counts of one sequence's state: of the keys that attention keeps, the last of its document."""
    if name not in ("key", "value"):
        return state[name][row]
    last = min(int(state["position"][row]), WINDOW - 1)
    return state[name][row][len(state[name][row]) - last :]


def assert_same_states(found: dict[str, State], expected: dict[str, State]) -> None:
    assert found.keys() == expected.keys()
    for layer, state in expected.items():
        assert found[layer].keys() == state.keys()
        for name, tensor in state.items():
            assert found[layer][name].dtype == torch.float32 and len(tensor) == BATCH
            for row in range(BATCH):
                one, other = counting(found[layer], name, row), counting(state, name, row)
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=f"{layer}.{name}")


@READ
@BACKBONES
@torch.no_grad()
def test_pieces_are_one_pass(read_words: str, layers: list[str]) -> None:
    model = random_hat(read_words, layers=layers, num_layers=len(layers))
    for seed in range(3):
        tokens, starts, words = packed(seed)
        expected, states = in_pieces(model, tokens, starts, words, [LENGTH])
        torch.testing.assert_close(expected, logits_of(model, tokens, starts, words), atol=1e-5, rtol=0)
        for lengths in ([1] * LENGTH, [1, LENGTH - 1], random_lengths(seed), random_lengths(seed + 10)):
            logits, final = in_pieces(model, tokens, starts, words, lengths)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
            assert_same_states(final, states)


@torch.no_grad()
def test_a_text_begins_a_document_and_a_word_whatever_is_said() -> None:
    model = random_hat()
    tokens, starts, words = packed(4)
    said = words.clone()
    said[:, 0] = False
    starts = first_only(tokens)
    logits, _ = model.logits(tokens, None, None, said)
    torch.testing.assert_close(logits, logits_of(model, tokens, starts, words), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_are_taken_apart_and_joined() -> None:
    """Sequences of which different numbers of words have ended, none of one of them."""
    model = random_hat()
    tokens, _, words = packed(5)
    words[1, 1:20] = False
    pieces = [model.logits(tokens[[row], :20], None, None, words[[row], :20])[1] for row in (1, 0)]
    joined = select_rows(join_rows(pieces), [1, 0])
    logits, _ = model.logits(tokens[:, 20:], joined, None, words[:, 20:])
    expected, _ = model.logits(tokens, None, None, words)
    torch.testing.assert_close(logits, expected[:, 20:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_states_are_not_changed_by_what_follows() -> None:
    model = random_hat()
    tokens, starts, words = packed(6)
    _, states = model.logits(tokens[:, :15], None, starts[:, :15], words[:, :15])
    kept = {layer: {name: tensor.clone() for name, tensor in state.items()} for layer, state in states.items()}
    model.logits(tokens[:, 15:], states, starts[:, 15:], words[:, 15:])
    for layer, state in kept.items():
        for name, tensor in state.items():
            assert torch.equal(states[layer][name], tensor), (layer, name)


def test_gradients_flow_through_the_state() -> None:
    model = random_hat()
    tokens, starts, words = packed(7)
    slopes = torch.randn(BATCH, LENGTH, 264, generator=torch.Generator().manual_seed(0))
    found = []
    for logits in (logits_of(model, tokens, starts, words), in_pieces(model, tokens, starts, words, [13, 1, 26])[0]):
        model.zero_grad()
        (logits * slopes).sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for (name, _), expected, gradient in zip(model.named_parameters(), *found, strict=True):
        scale = expected.abs().max()
        assert scale > 1e-4, name
        torch.testing.assert_close(gradient / scale, expected / scale, atol=1e-4, rtol=0, msg=name)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    """Also where scores are so large that no exponential of them can be held, in either part."""
    generator = torch.Generator().manual_seed(1)
    scores = 300 * torch.randn(12, 3, generator=generator)
    values = torch.randn(12, 3, 4, generator=generator)
    word = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 1, 2])
    whole = sum_words(scores, values, word, 3)
    before = sum_words(scores[:9], values[:9], word[:9], 3)
    # The words in another order, and one more that has no byte elsewhere.
    places = torch.tensor([2, 0, 3])
    later = sum_words(
        scores[9:], values[9:], places[word[9:]], 4, (places, WordSums(before.highest, before.total, before.mixed))
    )
    assert whole.pooled.isfinite().all()
    for name in ("highest", "total", "mixed", "pooled"):
        torch.testing.assert_close(getattr(later[places], name), getattr(whole, name), atol=1e-6, rtol=1e-5)
