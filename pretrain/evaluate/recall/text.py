"""Recall of a trained model, as text: a passkey by depth and length, and lines that are written a second time.

Nothing is generated: an answer is right where each of its tokens is the likeliest after those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from data.tokenizers import Tokenizer
from pretrain.errors import InputError
from pretrain.evaluate.by_position import SEGMENT
from pretrain.evaluate.recall.passkey import DEPTHS, place_at_depth
from pretrain.models.decoder import Decoder
from pretrain.models.mixer import State
from pretrain.reading import rows_by_length

_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


@dataclass(frozen=True)
class TextRecall:
    """What a model recalls of texts of one task, depth and length.

    Attributes:
        task: ``passkey`` or ``copying``.
        length: tokens that were read, the answer included; the mean over the examples.
        depth: where what is asked for stands: 0 at the front, 1 right before the question.
        examples: how many.
        exact: share of answers that are right as a whole.
        tokens: share of the answers' tokens that are right.
    """

    task: str
    length: float
    depth: float
    examples: int
    exact: float
    tokens: float


@dataclass(frozen=True)
class TextExample:
    """A prompt, and what must follow."""

    prompt: str
    answer: str


class TextTask:
    """A prompt of about so many bytes, with something at a depth that is asked for at the end."""

    name: ClassVar[str]

    def needle(self, random: np.random.Generator) -> tuple[str, str, str]:
        """What is hidden, the question behind the filler, and the answer."""
        raise NotImplementedError(f"{type(self).__name__} must say what is hidden")

    def example(self, size: int, depth: float, index: int, seed: int = 0) -> TextExample:
        """Example ``index`` with a prompt of ``size`` bytes, all of them ASCII.

        Raises:
            InputError: ``size`` does not hold what is hidden and the question.
        """
        random = np.random.default_rng([seed, size, round(depth * 1000), index, len(self.name)])
        hidden, question, answer = self.needle(random)
        room = size - len(hidden) - len(question)
        if room < 0:
            raise InputError(f"{self.name}: {size} bytes do not hold it; give {size - room} or more")
        filler = (_FILLER * (room // len(_FILLER) + 2))[:room]
        place = place_at_depth(depth, room, 0)
        return TextExample(filler[:place] + hidden + filler[place:] + question, answer)


class PasskeyText(TextTask):
    """Five digits among sentences (Mohtashami and Jaggi 2023, arXiv 2305.16300)."""

    name = "passkey"

    def needle(self, random: np.random.Generator) -> tuple[str, str, str]:
        number = "".join(map(str, random.integers(0, 10, 5).tolist()))
        hidden = f"\nThe pass key is {number}. Remember it. {number} is the pass key.\n"
        return hidden, "\nWhat is the pass key? The pass key is ", number


class CopyingText(TextTask):
    """A line of random letters, which begins again at the end: what follows its first four letters is asked."""

    name = "copying"

    def needle(self, random: np.random.Generator) -> tuple[str, str, str]:
        letters = "".join(_LETTERS[random.integers(0, len(_LETTERS), 12)])
        return f"\n{letters}\n", f"\n{letters[:4]}", letters[4:]


TEXT_TASKS: tuple[TextTask, ...] = (PasskeyText(), CopyingText())


@torch.no_grad()
def recall_of_text(
    model: Decoder, tokenizer: Tokenizer, lengths: Sequence[int], examples: int, seed: int = 0
) -> list[TextRecall]:
    """Every task at every length (bytes of the prompt) and depth.

    Args:
        model: whole in this process; it must not read words.
        tokenizer: the one that the model was trained with.
        lengths: bytes of the prompts.
        examples: of each.

    Raises:
        InputError: a length does not hold what is asked for, or the tokenizer joins a prompt's end with an answer.
    """
    found = []
    for task in TEXT_TASKS:
        for length in lengths:
            for depth in DEPTHS:
                texts = [task.example(length, depth, index, seed) for index in range(examples)]
                right = _right(model, tokenizer, texts)
                found.append(
                    TextRecall(
                        task.name,
                        float(np.mean([size for size, _ in right])),
                        depth,
                        examples,
                        float(np.mean([answers.all() for _, answers in right])),
                        float(np.concatenate([answers for _, answers in right]).mean()),
                    )
                )
    return found


def _right(model: Decoder, tokenizer: Tokenizer, texts: Sequence[TextExample]) -> list[tuple[int, np.ndarray]]:
    """Of each text how many tokens it has, and for each token of the answer whether it is the likeliest."""
    device = next(model.parameters()).device
    encoded = [_encoded(tokenizer, text) for text in texts]
    found: dict[int, tuple[int, np.ndarray]] = {}
    for rows in rows_by_length([tokens for tokens, _ in encoded]):
        tokens = torch.tensor([encoded[row][0] for row in rows], device=device)
        states: dict[str, State] | None = None
        likeliest = []
        for segment in tokens[:, :-1].split(SEGMENT, dim=1):
            logits, states = model.logits(segment, states)
            likeliest.append(logits[..., : tokenizer.vocab_size].argmax(dim=-1))
        correct = (torch.cat(likeliest, dim=1) == tokens[:, 1:]).cpu().numpy()
        for row, of_row in zip(rows, correct, strict=True):
            found[row] = (tokens.shape[1], of_row[-encoded[row][1] :])
    return [found[row] for row in range(len(texts))]


def _encoded(tokenizer: Tokenizer, text: TextExample) -> tuple[list[int], int]:
    """Boundary mark, prompt and answer as a model reads them, and how many tokens the answer has."""
    prompt = tokenizer.model_ids(tokenizer.encode(text.prompt.encode())).tolist()
    whole = tokenizer.model_ids(tokenizer.encode((text.prompt + text.answer).encode())).tolist()
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise InputError(
            f"the tokenizer joins the end of the prompt {text.prompt[-20:]!r} with the answer {text.answer!r}, so that "
            f"no tokens are the answer's own; this suite takes byte tokenizers, and those that cut there"
        )
    return [tokenizer.boundary_id, *whole], len(whole) - len(prompt)
