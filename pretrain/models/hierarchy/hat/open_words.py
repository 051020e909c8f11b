"""Words that may have begun before a call and may not end within it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.models.hierarchy.hat.words import WordSums
from pretrain.models.mixer import State


@dataclass(frozen=True)
class WordRow:
    """The words of one call, those of all sequences one after the other.

    The first of each sequence is the one that an earlier call left open, without any byte where there was no such
    call; the last of each is left open by this one. What stands between ends in this call.

    Attributes:
        word: ``(batch, sequence)`` int64, place in the row of the word that each byte belongs to.
        first, last: ``(batch,)`` int64, places of each sequence's first and last word.
        begins_document: ``(words,)`` bool, whether a document begins with the word; of a first one, what was said.
        ended: ``(ended words,)`` int64, places of the words that end in this call.
        counts: ``(batch,)`` int64, how many of them each sequence has.
    """

    word: Tensor
    first: Tensor
    last: Tensor
    begins_document: Tensor
    ended: Tensor
    counts: Tensor

    @property
    def words(self) -> int:
        return len(self.begins_document)


def find_words(word_starts: Tensor, document_starts: Tensor, open_begins: Tensor | None) -> WordRow:
    """The words that starts make.

    Args:
        word_starts, document_starts: ``(batch, sequence)`` bool; a document begins with a word.
        open_begins: ``(batch,)`` bool, whether a document begins with the word that is open; None where sequences
            begin here, each of them with a document.
    """
    word_starts = word_starts | document_starts
    if open_begins is None:
        document_starts, word_starts = document_starts.clone(), word_starts.clone()
        document_starts[:, 0] = word_starts[:, 0] = True
    begun = word_starts.sum(1)
    last = (begun + 1).cumsum(0) - 1
    first = last - begun
    word = first[:, None] + word_starts.cumsum(1)
    words = int(last[-1]) + 1
    begins = torch.zeros(words, dtype=torch.bool, device=word.device)
    begins[word[word_starts]] = document_starts[word_starts]
    ends = torch.ones_like(begins)
    ends[last] = False
    if open_begins is None:
        # No word was open.
        ends[first], begun = False, begun - 1
    else:
        begins[first] = open_begins
    return WordRow(word, first, last, begins, ends.nonzero()[:, 0], begun)


def known_before(row: WordRow, read: Tensor, first_word: Tensor, open_vector: Tensor | None) -> Tensor:
    """What bytes of each word may know of the words before it, ``(words, size)``.

    Args:
        read: ``(ended words, size)``, what the backbone made of the words that end.
        first_word: ``(size,)``, known before the first word of a document.
        open_vector: ``(batch, size)``, known before the words that were open; None where none were.
    """
    known = read.new_zeros(row.words, read.shape[1]).index_put((row.ended + 1,), read)
    known = torch.where(row.begins_document[:, None], first_word.to(read.dtype), known)
    return known if open_vector is None else known.index_put((row.first,), open_vector.to(read.dtype))


def open_word_state(row: WordRow, sums: WordSums, known: Tensor) -> State:
    """What a later call needs of the words that this one leaves open, float32."""
    left = sums[row.last]
    return {
        "highest": left.highest,
        "total": left.total,
        "mixed": left.mixed,
        "known": known[row.last].float(),
        "begins_document": row.begins_document[row.last].float(),
    }
