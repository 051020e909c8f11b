"""A bigram model of the tokens: the figure that a trained model has to beat to have learned anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from data.batch import IGNORED_LABEL
from data.errors import DataError
from data.samples import HeldOutSamples, Samples

# The table of pairs has vocab_size squared entries: 128 MiB of counts at this size.
LARGEST_VOCABULARY = 4096
DEFAULT_TRAINING_TOKENS = 1 << 27
_CHUNK_TOKENS = 1 << 24
_CHUNK_SAMPLES = 64


def bigram_bits_per_byte(
    train: Samples,
    held_out: HeldOutSamples,
    training_tokens: int = DEFAULT_TRAINING_TOKENS,
    held_out_indices: Sequence[int] | None = None,
) -> float:
    """Bits per raw byte of a bigram model on the held-out split, fitted on the training split.

    Witten-Bell interpolation (Witten and Bell 1991; Chen and Goodman 1998, section 2.5) of the bigram with an
    add-one unigram: with c(a) the count of a as a context and t(a) the number of different tokens seen after
    it, p(b | a) = (c(a, b) + t(a) p(b)) / (c(a) + t(a)), p(b) = (c(b) + 1) / (N + V), and p(b | a) = p(b)
    after a context never seen. It is scored on exactly the labels that a model is scored on, boundary marks
    included, the input token at the same position being the context.

    Fits on at most the first ``training_tokens`` stored tokens; scores the samples ``held_out_indices``, or all.
    Raises ``DataError`` for a vocabulary above ``LARGEST_VOCABULARY``, whose table of pairs would not fit, and for
    labels that stand for no bytes.
    """
    vocab_size = len(train.format.token_byte_lengths)
    if vocab_size > LARGEST_VOCABULARY:
        raise DataError(
            f"the bigram baseline counts every pair of ids and takes vocabularies up to {LARGEST_VOCABULARY},"
            f" but this tokenizer has {vocab_size} ids; use it with the bytes tokenizer."
        )
    pair_bits = _bigram_bits(count_pairs(train.format.model_ids(train.first_tokens(training_tokens)), vocab_size))
    bits = 0.0
    label_bytes = 0
    indices = range(held_out.samples_per_epoch) if held_out_indices is None else held_out_indices
    for first in range(0, len(indices), _CHUNK_SAMPLES):
        batch = held_out.batch(indices[first : first + _CHUNK_SAMPLES])
        labels = batch.labels.numpy()
        scored = labels != IGNORED_LABEL
        bits += float(pair_bits[batch.tokens.numpy()[scored], labels[scored]].sum())
        label_bytes += batch.label_bytes
    if label_bytes == 0:
        raise DataError("the held-out labels stand for no bytes; check that data.tokenizer fits data.source.")
    return bits / label_bytes


def count_pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """(vocab_size, vocab_size) int64: how often each id (column) follows each id (row) in ``tokens``."""
    counts = np.zeros(vocab_size * vocab_size, dtype=np.int64)
    for first in range(0, max(len(tokens) - 1, 0), _CHUNK_TOKENS):
        chunk = tokens[first : first + _CHUNK_TOKENS + 1].astype(np.int64)
        counts += np.bincount(chunk[:-1] * vocab_size + chunk[1:], minlength=vocab_size * vocab_size)
    return counts.reshape(vocab_size, vocab_size)


def _bigram_bits(pairs: np.ndarray) -> np.ndarray:
    """(V, V) float64: -log2 p(b | a) from the counts of pairs (a, b)."""
    vocab_size = len(pairs)
    followed = pairs.sum(axis=0)
    unigram = (followed + 1) / (followed.sum() + vocab_size)
    contexts = pairs.sum(axis=1, keepdims=True)
    distinct = (pairs > 0).sum(axis=1, keepdims=True)
    # A context never seen has no counts and no distinct followers: weight 1 leaves the unigram alone.
    backoff = np.where(contexts > 0, distinct, 1)
    probabilities = (pairs + backoff * unigram) / (contexts + backoff)
    return np.log(probabilities) / -math.log(2)
