"""Selective copying (Gu and Dao 2023, arXiv 2312.00752): what stands between gaps is repeated without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pretrain.evaluate.recall.base import Example, RecallTask, content_of, no_labels

_GAP, _COPY = 0, 1
_FIRST_SYMBOL = 2


@dataclass(frozen=True)
class SelectiveCopying(RecallTask):
    """Symbols at random places among gaps, then a mark for each of them, at which they are asked in their order.

    The symbols of a sequence are distinct. In longer sequences they are as many, and the gaps longer.

    Attributes:
        copied: symbols in a sequence.
        symbols: to draw from.
    """

    name: ClassVar[str] = "copying"
    copied: int = 6
    symbols: int = 16

    @property
    def vocabulary_size(self) -> int:
        return _FIRST_SYMBOL + self.symbols

    @property
    def shortest(self) -> int:
        return 3 * self.copied

    def chance(self, length: int) -> float:
        """One of the sequence's symbols."""
        return 1 / self.copied

    def draw(self, random: np.random.Generator, length: int, index: int) -> Example:
        symbols = _FIRST_SYMBOL + random.permutation(self.symbols)[: self.copied]
        before = length - self.copied
        tokens, labels = np.full(length, _GAP, dtype=np.int64), no_labels(length)
        tokens[np.sort(random.permutation(before)[: self.copied])] = symbols
        tokens[before:], labels[before:] = _COPY, symbols
        return Example(tokens, labels, content_of(symbols.tolist()))


TASKS = (SelectiveCopying(),)
