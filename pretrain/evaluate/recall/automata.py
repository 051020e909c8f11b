"""In-context languages: each sequence is a walk through an automaton of its own, to be induced from it.

After Akyürek et al. 2024 (In-context language learning, arXiv 2401.12973), with automata whose states have names, so
that what a sequence has shown decides the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pretrain.evaluate.recall.base import Example, RecallTask, content_of, no_labels


@dataclass(frozen=True)
class InContextAutomaton(RecallTask):
    """State, symbol, state, symbol, ...: at a symbol the next state is asked, once this step was seen before.

    Every symbol permutes the states, the first one in a single cycle, so that all are reached and none is visited more
    than others in the long run. Two automata are the
    same if they have the same named states and the same steps between them; where the walk begins does not matter.

    Attributes:
        states: of each automaton.
        symbols: of each automaton, the same in all.
        names: what names of states are drawn from.
    """

    name: ClassVar[str] = "automaton"
    states: int = 4
    symbols: int = 2
    names: int = 16

    @property
    def vocabulary_size(self) -> int:
        return self.symbols + self.names

    @property
    def shortest(self) -> int:
        # By then some step must have been seen before.
        return 2 * (self.states * self.symbols + 1)

    def chance(self, length: int) -> float:
        """One of the automaton's states."""
        return 1 / self.states

    def draw(self, random: np.random.Generator, length: int, index: int) -> Example:
        names = self.symbols + np.sort(random.permutation(self.names)[: self.states])
        steps = np.stack([random.permutation(self.states) for _ in range(self.symbols)])
        round_trip = random.permutation(self.states)
        steps[0, round_trip] = np.roll(round_trip, 1)
        tokens, labels = np.empty(length, dtype=np.int64), no_labels(length)
        state, seen = int(random.integers(self.states)), set()
        inputs = random.integers(0, self.symbols, length // 2 + 1).tolist()
        for position in range(0, length, 2):
            tokens[position] = names[state]
            if position + 1 == length:
                break
            symbol = inputs[position // 2]
            tokens[position + 1], following = symbol, int(steps[symbol, state])
            if (state, symbol) in seen:
                labels[position + 1] = names[following]
            seen.add((state, symbol))
            state = following
        return Example(tokens, labels, content_of(names.tolist(), steps.ravel().tolist()))


TASKS = (InContextAutomaton(),)
