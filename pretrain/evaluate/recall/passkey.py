"""A passkey among filler (Mohtashami and Jaggi 2023, arXiv 2305.16300), by depth and length, as tokens of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pretrain.evaluate.recall.base import Example, RecallTask, content_of, no_labels

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_DIGITS = 10
_KEY_FOLLOWS, _KEY_IS_ASKED = _DIGITS, _DIGITS + 1
_FIRST_FILLER = _DIGITS + 2


def place_at_depth(depth: float, length: int, needle: int) -> int:
    """Where something of ``needle`` tokens begins in ``length`` tokens: 0 is the front, 1 the end."""
    return round(depth * (length - needle))


@dataclass(frozen=True)
class Passkey(RecallTask):
    """Filler with a marked number in it; at the end it is asked for, and every digit must be right.

    Cases are how deep the number stands: at the very front (0) to right before the question (1).

    Attributes:
        digits: of the number.
        fillers: tokens that the filler is drawn from.
    """

    name: ClassVar[str] = "passkey"
    whole_answers: ClassVar[bool] = True
    digits: int = 3
    fillers: int = 16

    @property
    def vocabulary_size(self) -> int:
        return _FIRST_FILLER + self.fillers

    @property
    def shortest(self) -> int:
        return 2 * (self.digits + 1)

    def chance(self, length: int) -> float:
        """A number at random."""
        return float(_DIGITS**-self.digits)

    def draw(self, random: np.random.Generator, length: int, index: int) -> Example:
        depth = DEPTHS[index % len(DEPTHS)]
        number = random.integers(0, _DIGITS, self.digits)
        tokens, labels = random.integers(_FIRST_FILLER, self.vocabulary_size, length), no_labels(length)
        # The question and all digits of the answer but the last stand at the end.
        question = length - self.digits
        place = place_at_depth(depth, question, 1 + self.digits)
        tokens[place], tokens[place + 1 : place + 1 + self.digits] = _KEY_FOLLOWS, number
        tokens[question], tokens[question + 1 :], labels[question:] = _KEY_IS_ASKED, number[:-1], number
        return Example(tokens, labels, content_of(number.tolist()), f"depth {depth:g}")


TASKS = (Passkey(),)
