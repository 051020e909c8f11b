"""The bigram baseline against a slow dictionary implementation of the same formula."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from data.baseline import bigram_bits_per_byte
from data.errors import DataError
from data.packing import PackedSamples


def slow_bits_per_byte(training_tokens: list[int], held_out_tokens: list[int], vocab_size: int) -> float:
    """Witten-Bell interpolated bigram, one token at a time."""
    followers: dict[int, Counter[int]] = defaultdict(Counter)
    unigrams: Counter[int] = Counter()
    for context, token in zip(training_tokens[:-1], training_tokens[1:], strict=True):
        followers[context][token] += 1
        unigrams[token] += 1
    bits = 0.0
    raw_bytes = 0
    for context, token in zip(held_out_tokens[:-1], held_out_tokens[1:], strict=True):
        probability = (unigrams[token] + 1) / (sum(unigrams.values()) + vocab_size)
        seen = followers.get(context)
        if seen:
            total, distinct = sum(seen.values()), len(seen)
            probability = (seen[token] + distinct * probability) / (total + distinct)
        bits -= math.log2(probability)
        raw_bytes += token < 256
    return bits / raw_bytes


@pytest.fixture
def splits(make_byte_samples) -> tuple[PackedSamples, PackedSamples]:
    rng = np.random.default_rng(0)
    # Letters a to p in the training text and a to t in the held-out text: some contexts are never seen.
    train = [bytes(rng.integers(97, 113, 40).tolist()) + b"abcabc" * 5 for _ in range(30)]
    held_out = [bytes(rng.integers(97, 117, 25).tolist()) + b"abcabc" * 2 for _ in range(7)]
    return make_byte_samples(train, 16), make_byte_samples(held_out, 16, shuffled=False)


def test_against_dictionaries(splits: tuple[PackedSamples, PackedSamples]) -> None:
    train, held_out = splits
    expected = slow_bits_per_byte(train.documents.tokens.tolist(), held_out.documents.tokens.tolist(), 257)
    # Both add a few hundred float64 logarithms, in another order.
    assert bigram_bits_per_byte(train, held_out) == pytest.approx(expected, rel=1e-12)


def test_on_fewer_training_tokens(splits: tuple[PackedSamples, PackedSamples]) -> None:
    train, held_out = splits
    expected = slow_bits_per_byte(train.documents.tokens.tolist()[:100], held_out.documents.tokens.tolist(), 257)
    assert bigram_bits_per_byte(train, held_out, training_tokens=100) == pytest.approx(expected, rel=1e-12)


def test_counting_in_chunks_changes_nothing(splits, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bigram_bits_per_byte(*splits)
    monkeypatch.setattr("data.baseline._CHUNK_TOKENS", 7)
    monkeypatch.setattr("data.baseline._CHUNK_SAMPLES", 2)
    assert bigram_bits_per_byte(*splits) == pytest.approx(whole, rel=1e-12)


def test_every_next_token_has_probability_one_in_all(splits) -> None:
    from data.baseline import _bigram_bits, count_pairs

    train, _ = splits
    probabilities = 2.0 ** -_bigram_bits(count_pairs(train.documents.tokens, 257))
    # 257 float64 terms.
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12)


def test_uniform_text_takes_eight_bits(make_byte_samples, make_random_contents) -> None:
    rng = np.random.default_rng(3)
    train = make_byte_samples(make_random_contents(rng, 4, 50), 16)
    held_out = make_byte_samples([rng.integers(0, 256, 5000, dtype=np.uint8).tobytes()], 16, shuffled=False)
    assert bigram_bits_per_byte(train, held_out) > 8


def test_a_large_vocabulary_is_refused(splits: tuple[PackedSamples, PackedSamples]) -> None:
    train, held_out = splits
    train.format = replace(train.format, token_byte_lengths=np.ones(50_000, dtype=np.int64))
    with pytest.raises(DataError, match="up to 4096.*50000 ids.*bytes tokenizer"):
        bigram_bits_per_byte(train, held_out)
