"""What answers each recall task from its tokens alone, written without looking at how they are made."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# position -> the answer there; positions that nothing before them decides are left out
Answers = dict[int, int]


def associative(tokens: Sequence[int]) -> Answers:
    """The value that followed a key where it stood first; keys are 1 to 32, values 33 to 64."""
    found: Answers = {}
    for position, token in enumerate(tokens):
        first = tokens.index(token)
        if 1 <= token <= 32 and first < position:
            found[position] = tokens[first + 1]
    return found


def passkey(tokens: Sequence[int]) -> Answers:
    """10 stands before the three digits, 11 asks for them; the digits but the last follow it."""
    key, question = tokens.index(10), tokens.index(11)
    return {question + place: tokens[key + 1 + place] for place in range(3)}


def automaton(tokens: Sequence[int]) -> Answers:
    """What followed the same state and symbol before; symbols are 0 and 1, at odd positions."""
    pairs = [(tokens[position - 1], tokens[position]) for position in range(1, len(tokens), 2)]
    found: Answers = {}
    for number, pair in enumerate(pairs):
        if pair in pairs[:number]:
            found[2 * number + 1] = tokens[2 * pairs.index(pair) + 2]
    return found


def modulo(modulus: int) -> Callable[[Sequence[int]], Answers]:
    return lambda tokens: {place: tokens[: place + 1].count(1) % modulus for place in range(len(tokens))}


def equal_counts(tokens: Sequence[int]) -> Answers:
    """a^n b^n c^n and a mark, as letters: what follows each b and c."""
    text = "".join("abc|"[token] for token in tokens)
    found: Answers = {}
    for match in re.finditer(r"(a+)(b+)(c+)\|", text):
        count = len(match[1])
        after = match.start() + count
        for place in range(2 * count):
            found[after + place] = (1 if place + 1 < count else 2) if place + 1 < 2 * count else 3
    return found


def brackets(tokens: Sequence[int]) -> Answers:
    """Behind a closing bracket the partner of the innermost open one, found by counting backwards."""
    found: Answers = {}
    for position, token in enumerate(tokens):
        if token < 4:
            continue
        closed = 0
        for earlier in reversed(tokens[: position + 1]):
            closed += 1 if earlier >= 4 else -1
            if closed < 0:
                found[position] = earlier + 4
                break
    return found


def copying(tokens: Sequence[int]) -> Answers:
    """What is neither gap (0) nor mark (1), at the marks."""
    symbols = [token for token in tokens if token > 1]
    marks = [position for position, token in enumerate(tokens) if token == 1]
    return dict(zip(marks, symbols, strict=True))


ORACLES: dict[str, Callable[[Sequence[int]], Answers]] = {
    "mqar": associative,
    "passkey": passkey,
    "automaton": automaton,
    "parity": modulo(2),
    "mod3": modulo(3),
    "mod5": modulo(5),
    "anbncn": equal_counts,
    "dyck": brackets,
    "copying": copying,
}
