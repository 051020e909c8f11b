"""HAT against its equations, byte by byte; causal to the byte; packed documents are documents alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from data.batch import Batch
from pretrain.errors import InputError
from pretrain.models.hierarchy.chunking import find_chunks
from pretrain.models.hierarchy.hat.model import HAT
from pretrain.models.hierarchy.hat.words import WordPooling, WordReader, WordShift
from pretrain.models.mixer import Documents
from tests.models.hat_models import random_hat, random_words
from tests.models.test_hnet import first_only

LENGTH, BATCH = 40, 3
READ = pytest.mark.parametrize("read_words", ["every", "first"])


def random_bytes(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: HAT, tokens: Tensor, starts: Tensor, words: Tensor) -> Tensor:
    hidden, _, _ = model._blocks(model._embed(tokens), {}, None, Documents(starts, words), keep_states=False)
    return model._head(hidden).transpose(0, 1)


def rms(vector: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return vector / (vector.square().mean() + epsilon).sqrt() * weight


def pooled_by_equations(p: dict[str, Tensor], encoded: list[Tensor], heads: int, epsilon: float) -> Tensor:
    """One word's vector from its bytes' vectors."""
    size = len(encoded[0]) // heads
    normed = [rms(vector, p["norm.weight"], epsilon) for vector in encoded]
    mixed = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = [
            (p["query"][own] * (p["projections.key_weight"][own] @ vector)).sum() / size**0.5 for vector in normed
        ]
        weights = [score.exp() for score in scores]
        values = [p["projections.value_weight"][own] @ vector for vector in normed]
        mixed.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return p["output.weight"] @ torch.cat(mixed)


def read_by_equations(p: dict[str, Tensor], byte: Tensor, word: Tensor, epsilon: float) -> Tensor:
    gate = torch.sigmoid(p["gate.gate_weight"] @ rms(byte, p["byte_norm.weight"], epsilon))
    value = p["value.value_weight"] @ rms(word, p["word_norm.weight"], epsilon)
    return byte + p["output.weight"] @ (gate * value)


def doubles(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in module.named_parameters()}


def test_words_are_pooled_shifted_and_read_as_the_equations_say() -> None:
    model = random_hat()
    epsilon, heads = model.model.norm_epsilon, model.model.hierarchy.num_heads
    parts: list[WordPooling | WordShift | WordReader] = [model.pooling, model.shift, model.readers[0]]
    generator = torch.Generator().manual_seed(3)
    encoded = torch.randn(LENGTH, BATCH, 32, generator=generator).requires_grad_()
    starts = first_only(random_bytes(BATCH, LENGTH))
    starts[1, 13] = starts[2, 1] = starts[2, 39] = True
    chosen = random_words(starts, 4)
    slopes = torch.randn(LENGTH, BATCH, 32, generator=generator)

    words = find_chunks(chosen, starts, continues=False)
    begins = words.begins_sequence | words.begins_document
    pooled = parts[0](encoded, words.latest, len(words.row))
    output = parts[2](encoded, parts[1](torch.tanh(pooled), begins), words.latest)
    ours = [encoded] + [parameter for part in parts for parameter in part.parameters()]
    found = torch.autograd.grad((output * slopes).sum(), ours)

    weights = [doubles(part) for part in parts]
    bytes_ = encoded.detach().double().requires_grad_()
    expected: list[list[Tensor]] = []
    for row in range(BATCH):
        outputs: list[Tensor] = []
        known: Tensor | None = None
        position = 0
        while position < LENGTH:
            end = position + 1
            while end < LENGTH and not chosen[row, end]:
                end += 1
            if starts[row, position]:
                known = weights[1]["first_word"]
            outputs += [
                read_by_equations(weights[2], bytes_[time, row], known, epsilon) for time in range(position, end)
            ]
            known = torch.tanh(
                pooled_by_equations(weights[0], [bytes_[time, row] for time in range(position, end)], heads, epsilon)
            )
            position = end
        expected.append(outputs)
    reference = torch.stack([torch.stack(outputs) for outputs in expected], 1)
    theirs = [bytes_] + [value for part in weights for value in part.values()]
    gradients = torch.autograd.grad((reference * slopes).sum(), theirs)
    torch.testing.assert_close(output.double(), reference, atol=1e-5, rtol=1e-5)
    for one, other in zip(found, gradients, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one.double(), other, atol=2e-5 * other.abs().max().item(), rtol=1e-4)


@READ
def test_every_parameter_gets_a_gradient(read_words: str) -> None:
    model = random_hat(read_words)
    tokens = random_bytes(BATCH, LENGTH)
    starts = first_only(tokens)
    model(tokens, tokens, starts, random_words(starts, 0)).backward()
    assert len(model.readers) == (2 if read_words == "every" else 1)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-7, name


@READ
@torch.no_grad()
def test_no_output_depends_on_a_later_byte_or_on_another_row(read_words: str) -> None:
    model = random_hat(read_words)
    tokens = random_bytes(BATCH, LENGTH)
    starts = first_only(tokens)
    words = random_words(starts, 1)
    expected = logits_of(model, tokens, starts, words)
    inside = 0
    for position in range(1, LENGTH, 3):
        changed = tokens.clone()
        changed[1, position] = (changed[1, position] + 100) % 257
        logits = logits_of(model, changed, starts, words)
        torch.testing.assert_close(logits[1, :position], expected[1, :position], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=0)
        assert (logits[1, position:] - expected[1, position:]).abs().amax(-1).min() > 1e-6
        inside += not words[1, position]
    assert inside > 5, "bytes that stand inside a word are the case that could go wrong"


@READ
@torch.no_grad()
def test_a_byte_reaches_the_next_word_through_its_words_vector(read_words: str) -> None:
    """With blocks that carry nothing from byte to byte switched off, only the backbone is left to tell."""
    model = random_hat(read_words)
    for stack in (model.encoder, *model.decoder):
        for block in stack.layers:
            block.mixer.output.weight.zero_()
    tokens = random_bytes(1, 12)
    starts = first_only(tokens)
    words = starts.clone()
    words[0, [4, 9]] = True
    expected = logits_of(model, tokens, starts, words)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 100) % 257
    moved = (logits_of(model, changed, starts, words) - expected)[0].abs().amax(-1) > 1e-5
    assert moved.tolist() == [False] * 5 + [True] + [False] * 3 + [True] * 3


@READ
def test_packed_documents_are_documents_alone(read_words: str) -> None:
    model = random_hat(read_words)
    lengths = [11, 1, 17, 11]
    tokens = random_bytes(1, sum(lengths), seed=2)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True
    words = random_words(starts, 5)
    weights = torch.randn(sum(lengths), 264, generator=torch.Generator().manual_seed(0))

    def gradients(logits: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        whole = torch.cat(logits)
        model.zero_grad()
        (whole * weights).sum().backward()
        return whole.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    packed, packed_gradients = gradients([logits_of(model, tokens, starts, words)[0]])
    pieces = zip(tokens.split(lengths, 1), words.split(lengths, 1), strict=True)
    alone, alone_gradients = gradients([logits_of(model, piece, first_only(piece), own)[0] for piece, own in pieces])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    for (name, _), gradient, expected in zip(model.named_parameters(), packed_gradients, alone_gradients, strict=True):
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradient / scale, expected / scale, atol=1e-4, rtol=0, msg=name)


def test_bytes_per_word_are_counted_anew() -> None:
    model = random_hat()
    tokens = random_bytes(1, 12)
    starts = first_only(tokens)
    words = starts.clone()
    words[0, [4, 9]] = True
    for _ in range(2):
        model(tokens, tokens, starts, words)
    assert model.take_metrics() == {"bytes_per_word": 4.0}
    assert model.take_metrics() == {"bytes_per_word": 0.0}


def test_what_it_cannot_do_is_refused() -> None:
    model = random_hat()
    tokens = random_bytes(1, 4)
    with pytest.raises(InputError, match="was given tokens alone; give word_starts, as data.tokenizer"):
        model.logits(tokens)
    with pytest.raises(InputError, match="forms no chunks of its own"):
        model.chunk_starts(tokens)
    batch = Batch(tokens, tokens, first_only(tokens), label_bytes=4, label_count=4)
    with pytest.raises(InputError, match="knows no words; set data.tokenizer.type to hierarchical_bytes"):
        model.inputs(batch)
