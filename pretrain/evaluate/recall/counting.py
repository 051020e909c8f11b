"""Counting and state tracking: a running count modulo k, and a^n b^n c^n.

Their sequences make no demands on what is stored but for the count; they differ in how it must be kept (Delétang et al.
2023, arXiv 2207.02098; Grazzi et al. 2025, arXiv 2411.12537).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pretrain.evaluate.recall.base import Example, RecallTask, content_of, no_labels


@dataclass(frozen=True)
class CountModulo(RecallTask):
    """Zeros and ones; at every position the answer is how many ones there were so far, modulo ``modulus``."""

    modulus: int = 2

    @property
    def name(self) -> str:
        return "parity" if self.modulus == 2 else f"mod{self.modulus}"

    @property
    def vocabulary_size(self) -> int:
        return max(2, self.modulus)

    @property
    def shortest(self) -> int:
        return 16

    def chance(self, length: int) -> float:
        """The likeliest count at each position; nearly 1 / modulus, but for the first positions."""
        likely, total = np.eye(self.modulus)[0], 0.0
        for _ in range(length):
            likely = (likely + np.roll(likely, 1)) / 2
            total += likely.max()
        return float(total / length)

    def draw(self, random: np.random.Generator, length: int, index: int) -> Example:
        tokens = random.integers(0, 2, length)
        return Example(tokens, tokens.cumsum() % self.modulus, content_of(tokens.tolist()))


_A, _B, _C, _END = range(4)


@dataclass(frozen=True)
class EqualCounts(RecallTask):
    """Strings a^n b^n c^n, each with a mark behind it, n anew in each: what follows a b or a c is asked.

    Of one string all of these are one answer. The rest of the sequence is filled with the mark.

    Attributes:
        strings: in a sequence.
    """

    name: ClassVar[str] = "anbncn"
    whole_answers: ClassVar[bool] = True
    strings: int = 2
    vocabulary_size: int = 4

    @property
    def shortest(self) -> int:
        # Some dozens of different sequences.
        return self.strings * 25

    def largest(self, length: int) -> int:
        """The largest n in sequences of this length; the smallest is 1."""
        return (length // self.strings - 1) // 3

    def chance(self, length: int) -> float:
        """An n at random."""
        return 1 / self.largest(length)

    def draw(self, random: np.random.Generator, length: int, index: int) -> Example:
        counts = random.integers(1, self.largest(length) + 1, self.strings).tolist()
        tokens, labels = np.full(length, _END, dtype=np.int64), no_labels(length)
        place = 0
        for count in counts:
            tokens[place : place + 3 * count] = np.repeat([_A, _B, _C], count)
            asked = slice(place + count, place + 3 * count)
            labels[asked] = tokens[place + count + 1 : place + 3 * count + 1]
            place += 3 * count + 1
        return Example(tokens, labels, content_of(counts))


TASKS = (CountModulo(2), CountModulo(3), CountModulo(5), EqualCounts())
