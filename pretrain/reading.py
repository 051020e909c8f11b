"""Texts that a model has read, and goes on reading token by token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.models.decoder import Decoder
from pretrain.models.mixer import State
from pretrain.models.states import join_rows, select_rows

# Logits are made for a whole segment of a prompt; this bounds their memory for long ones.
PROMPT_SEGMENT = 4096


class Reading:
    """What a model knows of several texts, every token of which it has read.

    Attributes:
        rows: which of the texts each row of the batch is.
        logits: ``(rows, vocabulary)`` of what follows each.
        states: after the tokens read so far.
    """

    rows: list[int]
    logits: Tensor
    states: dict[str, State]

    def __init__(self, model: Decoder, texts: Sequence[Sequence[int]]):
        """Reads texts of equal length together, so that nothing but their own tokens enters a state."""
        self.model, self.device = model, next(model.parameters()).device
        self.rows, all_logits, all_states = [], [], []
        for rows in rows_by_length(texts):
            tokens = torch.tensor([texts[row] for row in rows], dtype=torch.int64, device=self.device)
            states = None
            for segment in tokens.split(PROMPT_SEGMENT, dim=1):
                logits, states = model.logits(segment, states)
            self.rows += rows
            all_logits.append(logits[:, -1])
            all_states.append(states)
        self.logits, self.states = torch.cat(all_logits), join_rows(all_states)

    def read(self, positions: list[int], tokens: Tensor) -> None:
        """Goes on with some rows of the batch, and forgets the others; may change the order of rows.

        Args:
            positions: of the rows, ascending.
            tokens: ``(positions,)`` int64, the next one of each.
        """
        states = self.states if len(positions) == len(self.rows) else select_rows(self.states, positions)
        self.rows = [self.rows[position] for position in positions]
        logits, self.states = self.model.logits(tokens.unsqueeze(1), states)
        self.logits = logits[:, -1]


def rows_by_length(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of the texts, those of equal length together."""
    by_length = defaultdict(list)
    for row, text in enumerate(texts):
        by_length[len(text)].append(row)
    return list(by_length.values())
