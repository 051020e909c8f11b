"""Multi-query associative recall (MQAR; Arora et al. 2023, arXiv 2312.04927)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pretrain.evaluate.recall.base import Example, RecallTask, content_of, no_labels

_FILLER = 0
# Of gap n the probability is proportional to n ** (this - 1): most queries come soon.
_POWER = 0.01


@dataclass(frozen=True)
class AssociativeRecall(RecallTask):
    """Pairs of key and value, then each key once more: its value is the answer, at the key itself.

    Keys and values are distinct within a sequence, and the filler between queries is one token that is neither. In
    longer sequences the pairs are as many, and the queries further away.

    Attributes:
        pairs: in a sequence.
        keys: keys to draw from; as many values.
    """

    name: ClassVar[str] = "mqar"
    pairs: int = 8
    keys: int = 32

    @property
    def vocabulary_size(self) -> int:
        return 1 + 2 * self.keys

    @property
    def shortest(self) -> int:
        return 4 * self.pairs

    def chance(self, length: int) -> float:
        """One of the sequence's values."""
        return 1 / self.pairs

    def draw(self, random: np.random.Generator, length: int, index: int) -> Example:
        keys = 1 + random.permutation(self.keys)[: self.pairs]
        values = 1 + self.keys + random.permutation(self.keys)[: self.pairs]
        tokens, labels = np.full(length, _FILLER, dtype=np.int64), no_labels(length)
        tokens[0 : 2 * self.pairs : 2], tokens[1 : 2 * self.pairs : 2] = keys, values
        places = (length - 2 * self.pairs) // 2
        likely = np.arange(1, places + 1, dtype=np.float64) ** (_POWER - 1)
        gaps = random.choice(places, size=self.pairs, replace=False, p=likely / likely.sum())
        queried = random.permutation(self.pairs)
        at = 2 * self.pairs + 2 * gaps
        tokens[at], labels[at] = keys[queried], values[queried]
        pairs = sorted(zip(keys.tolist(), values.tolist(), strict=True))
        return Example(tokens, labels, content_of(*pairs))


TASKS = (AssociativeRecall(),)
