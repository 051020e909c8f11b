"""What every recall task is: sequences made by index, with labels only where what came before decides the answer.

An example is a function of (seed, task, split, length, index) alone. Which split it may belong to is decided by a hash
of its content, that is of what a model must not have seen in training (a set of pairs, an automaton, a string), so that
training and test are disjoint by construction, for every seed, length and number of examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from data.batch import IGNORED_LABEL, Batch
from pretrain.errors import InputError

Split = Literal["train", "test"]
# One content in so many belongs to the test split.
_SHARE_OF_TEST = 4
_MOST_DRAWS = 1000


@dataclass(frozen=True)
class Example:
    """One sequence. S = length.

    Attributes:
        tokens: (S,) int64.
        labels: (S,) int64: the answer at each position, ``IGNORED_LABEL`` where none is asked.
        content: what must be new in a test.
        case: what distinguishes it in a table of its task, as ``depth 0.25``; empty where the task has no cases.
    """

    tokens: np.ndarray
    labels: np.ndarray
    content: bytes
    case: str = ""


class RecallTask:
    """A family of sequences; subclasses say how one is drawn.

    Attributes:
        name: on the command line.
        whole_answers: whether labels that stand side by side are one answer, right only if all of them are; else
            each label is an answer.
        vocabulary_size: ids of tokens and labels lie in [0, vocabulary_size).
        shortest: fewest tokens of a sequence.
        training_length: tokens of the sequences that it is trained on, unless it is told otherwise.
    """

    name: ClassVar[str]
    whole_answers: ClassVar[bool] = False
    vocabulary_size: int
    shortest: int
    training_length: int = 64

    def draw(self, random: np.random.Generator, length: int, index: int) -> Example:
        """A sequence of ``length`` >= ``shortest`` tokens; ``index`` decides the case, ``random`` all else."""
        raise NotImplementedError(f"{type(self).__name__} must draw its sequences")

    def chance(self, length: int) -> float:
        """Share of answers that are right where they are guessed by someone who knows the task, but remembers and
        counts nothing."""
        raise NotImplementedError(f"{type(self).__name__} must say what guessing gives")

    def example(self, split: Split, length: int, index: int, seed: int = 0) -> Example:
        """Example ``index`` >= 0 of a split.

        Raises:
            InputError: ``length`` is too short for the task.
        """
        if length < self.shortest:
            raise InputError(f"{self.name}: sequences of {length} tokens are too short; give {self.shortest} or more")
        for attempt in range(_MOST_DRAWS):
            key = f"{seed}/{self.name}/{split}/{length}/{index}/{attempt}"
            random = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
            drawn = self.draw(random, length, index)
            if split_of(drawn.content) == split:
                return drawn
        raise AssertionError(f"{self.name}: no content of the split {split} in {_MOST_DRAWS} draws of length {length}")

    def examples(self, split: Split, length: int, indices: Iterable[int], seed: int = 0) -> list[Example]:
        """Several of them."""
        return [self.example(split, length, index, seed) for index in indices]

    def answers(self, labels: np.ndarray) -> np.ndarray:
        """(S,) int64: the number, from 0, of the answer that each label belongs to; -1 where none is asked."""
        asked = labels != IGNORED_LABEL
        begins = asked.copy()
        if self.whole_answers:
            begins[1:] &= ~asked[:-1]
        return np.where(asked, begins.cumsum() - 1, -1)


def split_of(content: bytes) -> Split:
    """The only split that a content may appear in."""
    return "test" if hashlib.sha256(content).digest()[0] % _SHARE_OF_TEST == 0 else "train"


def content_of(*parts: Iterable[int]) -> bytes:
    """A content as bytes, from lists of numbers."""
    return "/".join(",".join(map(str, part)) for part in parts).encode()


def no_labels(length: int) -> np.ndarray:
    """(length,) int64 labels of which none is asked."""
    return np.full(length, IGNORED_LABEL, dtype=np.int64)


def as_batch(examples: Sequence[Example]) -> Batch:
    """Examples of one length as the model reads them, each a document; labels stand for no bytes."""
    tokens = torch.from_numpy(np.stack([example.tokens for example in examples]))
    labels = torch.from_numpy(np.stack([example.labels for example in examples]))
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    starts[:, 0] = True
    return Batch(tokens, labels, starts, label_bytes=0, label_count=int((labels != IGNORED_LABEL).sum()))
