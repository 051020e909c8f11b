"""Reading for models that are told where words start, which the end of a text does not say for good."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.tokenizers import Tokenizer
from pretrain.errors import InputError
from pretrain.models.decoder import Decoder
from pretrain.models.mixer import State
from pretrain.models.states import join_rows, select_rows
from pretrain.reading import PROMPT_SEGMENT, Reading, rows_by_length

# How many of a text's last words can be read again without all that stands before them. A byte rarely changes more
# than the start of the word before it. Each costs the memory of one text's states.
SNAPSHOTS = 3


class WordText:
    """A text so far, where its words start, and states from which its end can be read again.

    Attributes:
        tokens: the boundary mark, then bytes.
        starts: whether each starts a word.
        snapshots: how many tokens were read, and the states of one row after them, the newest last.
    """

    def __init__(self, tokens: Sequence[int], tokenizer: Tokenizer):
        self.tokens, self.tokenizer = list(tokens), tokenizer
        self.content = bytearray(tokens[1:])
        self.starts = [True, *tokenizer.word_starts(bytes(self.content)).tolist()]
        self.snapshots: list[tuple[int, dict[str, State] | None]] = []

    def append(self, token: int) -> int | None:
        """Adds a byte; returns the place of the first token before it that starts a word now and did not, or did."""
        settled = self.tokenizer.settled_bytes(self.content)
        self.tokens.append(token)
        self.content.append(token)
        # The mark stands in front of the bytes.
        before, first = self.starts[settled + 1 :], settled + 1
        self.starts[first:] = self.tokenizer.word_starts(bytes(self.content[settled:])).tolist()
        for index, started in enumerate(before, first):
            if self.starts[index] != started:
                return index
        return None

    def remember(self, read: int, states: dict[str, State] | None) -> None:
        """Keeps states after ``read`` tokens, in place of any that are as new or newer; the oldest are dropped."""
        self.forget(read - 1)
        self.snapshots = [*self.snapshots, (read, states)][-SNAPSHOTS:]

    def forget(self, read: int) -> None:
        """Drops states after more than ``read`` tokens."""
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot[0] <= read]

    def last_words(self) -> list[int]:
        """Where the last ``SNAPSHOTS`` words start, in order."""
        places: list[int] = []
        for place in range(len(self.starts) - 1, -1, -1):
            if self.starts[place]:
                places.append(place)
                if len(places) == SNAPSHOTS:
                    break
        return places[::-1]


class WordReading(Reading):
    """Texts of which the words are always those of the text so far.

    Where a byte changes which earlier ones start words, the states that say otherwise are of no use: that text is
    read again, by itself, from the newest states before the change.
    """

    def __init__(self, model: Decoder, texts: Sequence[Sequence[int]], tokenizer: Tokenizer):
        """Reads texts of equal length together up to the last words of one of them, and then each by itself.

        Raises:
            InputError: the tokenizer cuts no words.
        """
        if tokenizer.word_start_flag is None:
            raise InputError(
                f"a model of type {model.model.hierarchy.type} reads where words start, but {type(tokenizer).__name__} "
                f"cuts no words; use the tokenizer that the model was trained with"
            )
        self.model, self.device = model, next(model.parameters()).device
        self.texts = [WordText(text, tokenizer) for text in texts]
        self.rows, found = [], []
        for rows in rows_by_length(texts):
            common = min(self.texts[row].last_words()[0] for row in rows)
            _, states = self._read_part([self.texts[row] for row in rows], None, 0, common)
            for index, row in enumerate(rows):
                alone = None if states is None else select_rows(states, [index])
                found.append(self._read_end(self.texts[row], alone, common))
            self.rows += rows
        self._join(found)

    def read(self, positions: list[int], tokens: Tensor) -> None:
        going_on, again = [], []
        for position, token in zip(positions, tokens.tolist(), strict=True):
            text = self.texts[self.rows[position]]
            changed = text.append(token)
            if changed is not None:
                text.forget(changed)
                again.append(position)
                continue
            going_on.append(position)
            if text.starts[-1]:
                text.remember(len(text.tokens) - 1, select_rows(self.states, [position]))
        found = []
        if going_on:
            states = select_rows(self.states, going_on)
            texts = [self.texts[self.rows[position]] for position in going_on]
            end = [text.tokens[-1:] for text in texts]
            found.append(self._logits(end, [text.starts[-1:] for text in texts], states))
        for position in again:
            text = self.texts[self.rows[position]]
            read, states = text.snapshots[-1] if text.snapshots else (0, None)
            found.append(self._read_end(text, states, read))
        self.rows = [self.rows[position] for position in (*going_on, *again)]
        self._join(found)

    def _join(self, found: list[tuple[Tensor, dict[str, State]]]) -> None:
        self.logits = torch.cat([logits for logits, _ in found])
        self.states = join_rows([states for _, states in found])

    def _read_end(self, text: WordText, states: dict[str, State] | None, begin: int) -> tuple[Tensor, dict[str, State]]:
        """Logits and states after all of a text of which ``begin`` tokens were read, remembering its last words."""
        ends = [place for place in text.last_words() if place > begin] + [len(text.tokens)]
        for end in ends:
            text.remember(begin, states)
            logits, states = self._read_part([text], states, begin, end)
            begin = end
        return logits, states

    def _read_part(
        self, texts: list[WordText], states: dict[str, State] | None, begin: int, end: int
    ) -> tuple[Tensor | None, dict[str, State] | None]:
        logits = None
        for first in range(begin, end, PROMPT_SEGMENT):
            part = slice(first, min(first + PROMPT_SEGMENT, end))
            logits, states = self._logits(
                [text.tokens[part] for text in texts], [t.starts[part] for t in texts], states
            )
        return logits, states

    def _logits(
        self, tokens: list[list[int]], starts: list[list[bool]], states: dict[str, State] | None
    ) -> tuple[Tensor, dict[str, State]]:
        """Those after the last of the tokens."""
        logits, states = self.model.logits(
            torch.tensor(tokens, device=self.device), states, word_starts=torch.tensor(starts, device=self.device)
        )
        return logits[:, -1], states
