"""Dyck words of bounded depth: brackets of several types, well nested (Hewitt et al. 2020, arXiv 2010.07515)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pretrain.evaluate.recall.base import Example, RecallTask, content_of, no_labels


@dataclass(frozen=True)
class NestedBrackets(RecallTask):
    """A prefix of a Dyck word; where a closing bracket leaves others open, the answer is what closes the innermost.

    After an opening bracket that would be plain, so nothing is asked there.

    Attributes:
        types: of brackets.
        depth: most that are open at once.
    """

    name: ClassVar[str] = "dyck"
    types: int = 4
    depth: int = 4

    @property
    def vocabulary_size(self) -> int:
        return 2 * self.types

    @property
    def shortest(self) -> int:
        return 16

    def chance(self, length: int) -> float:
        """A type at random."""
        return 1 / self.types

    def draw(self, random: np.random.Generator, length: int, index: int) -> Example:
        tokens, labels = np.empty(length, dtype=np.int64), no_labels(length)
        types, opens = random.integers(0, self.types, length).tolist(), (random.random(length) < 0.5).tolist()
        stack: list[int] = []
        for position in range(length):
            if not stack or (opens[position] and len(stack) < self.depth):
                stack.append(types[position])
                tokens[position] = types[position]
            else:
                tokens[position] = self.types + stack.pop()
                if stack:
                    labels[position] = self.types + stack[-1]
        return Example(tokens, labels, content_of(tokens.tolist()))


TASKS = (NestedBrackets(),)
