"""What the model reads: rows of tokens, what each predicts, and where documents begin."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from data.tokenizers.base import Tokenizer, split_word_starts

# The label where nothing is to be predicted; torch's cross entropy ignores it by default.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """Samples as the model reads them. B rows, S = sequence length."""

    tokens: torch.Tensor  # (B, S) int64
    labels: torch.Tensor  # (B, S) int64: the next token, or IGNORED_LABEL where nothing counts
    document_starts: torch.Tensor  # (B, S) bool: the model's state restarts before this token
    label_bytes: int  # raw bytes that the labels stand for; boundary marks stand for none
    label_count: int  # labels that are not ignored, boundary marks included
    # (B, S) bool: a word starts at this token, and wherever a document does; None where the tokenizer knows no words.
    word_starts: torch.Tensor | None = None

    @property
    def segment_ids(self) -> torch.Tensor:
        """(B, S) int64: the number, within its row, of the document that each token belongs to, from 0."""
        return self.document_starts.cumsum(dim=1) - 1

    @property
    def positions(self) -> torch.Tensor:
        """(B, S) int64: how many tokens of its document stand before each token in this row."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        return place - place.where(self.document_starts, 0).cummax(dim=1).values

    def cut(self, length: int) -> Batch:
        """The same tokens in rows of ``length`` tokens, which must divide S: (B * S / length, length).

        The state restarts at each row, and labels stay what they were, so no prediction is lost.
        """
        if length == self.tokens.shape[1]:
            return self
        return replace(
            self,
            tokens=self.tokens.reshape(-1, length),
            labels=self.labels.reshape(-1, length),
            document_starts=_begun_anew(self.document_starts, length),
            word_starts=None if self.word_starts is None else _begun_anew(self.word_starts, length),
        )

    def segment(self, index: int, count: int, multiple: int = 1) -> Batch:
        """Segment ``index`` of each row, all ``count`` of one length; label counts and bytes stay those of the whole.

        Rows that do not divide end in tokens that are documents of their own and predict nothing.

        Args:
            multiple: what the length of a segment must be divisible by.
        """
        length = -(-self.tokens.shape[1] // (count * multiple)) * multiple
        missing = count * length - self.tokens.shape[1]
        part = slice(index * length, (index + 1) * length)

        def of(tensor: torch.Tensor, filling: int) -> torch.Tensor:
            return torch.nn.functional.pad(tensor, (0, missing), value=filling)[:, part]

        return replace(
            self,
            tokens=of(self.tokens, 0),
            labels=of(self.labels, IGNORED_LABEL),
            document_starts=of(self.document_starts, True),
            word_starts=None if self.word_starts is None else of(self.word_starts, True),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            document_starts=self.document_starts.to(device, non_blocking=non_blocking),
            word_starts=None if self.word_starts is None else self.word_starts.to(device, non_blocking=non_blocking),
        )


def _begun_anew(starts: torch.Tensor, length: int) -> torch.Tensor:
    """Starts in rows of ``length`` tokens, each of which begins with one."""
    starts = starts.reshape(-1, length).clone()
    starts[:, 0] = True
    return starts


@dataclass(frozen=True)
class Rows:
    """Samples before they are a batch: S inputs and the last label, so S + 1 tokens."""

    tokens: np.ndarray  # (B, S + 1) int64 stored ids, filled up with the boundary mark
    valid: np.ndarray  # (B,) int64: so many predictions from the front count
    # (B, S + 1) bool: further places where the state restarts, although no mark stands there; None: there are none.
    starts: np.ndarray | None = None
    # (B,) bool: the first token follows the last one of another sample, whose state goes on; None: nowhere.
    goes_on: np.ndarray | None = None


@dataclass(frozen=True)
class SampleFormat:
    """How long samples are, and what their ids mean.

    Attributes:
        sequence_length: S, tokens of a sample that the model reads.
        boundary_id: the mark in front of each document.
        token_byte_lengths: (vocabulary,) int64, the raw bytes that each id stands for.
        predict_document_ends: whether a document's last token predicts the mark behind it.
        has_word_starts: whether stored ids say where words start (``data.tokenizers.base.split_word_starts``).
    """

    sequence_length: int
    boundary_id: int
    token_byte_lengths: np.ndarray
    predict_document_ends: bool = True
    has_word_starts: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer, sequence_length: int, predict_document_ends: bool = True) -> SampleFormat:
        """The format of samples of ``tokenizer``'s ids."""
        return cls(
            sequence_length,
            tokenizer.boundary_id,
            tokenizer.token_byte_lengths(),
            predict_document_ends,
            has_word_starts=tokenizer.word_start_flag is not None,
        )

    def model_ids(self, stored: np.ndarray) -> np.ndarray:
        """The ids that a model reads for ``stored`` ones, of the same shape."""
        return split_word_starts(stored)[0] if self.has_word_starts else stored

    def padding(self, count: int) -> Rows:
        """``count`` rows that predict nothing."""
        shape = (count, self.sequence_length + 1)
        return Rows(np.full(shape, self.boundary_id, dtype=np.int64), np.zeros(count, dtype=np.int64))

    def document_starts(self, rows: Rows) -> np.ndarray:
        """(B, S + 1) bool: at every mark, and at the first token, unless the row goes on where another sample ended."""
        starts = rows.tokens == self.boundary_id
        if rows.starts is not None:
            starts |= rows.starts
        starts[:, 0] |= True if rows.goes_on is None else ~rows.goes_on
        return starts

    def batch(self, rows: Rows) -> Batch:
        """The batch of ``rows``."""
        starts = self.document_starts(rows)
        tokens, words = split_word_starts(rows.tokens) if self.has_word_starts else (rows.tokens, None)
        labels = tokens[:, 1:].copy()
        if rows.starts is not None:
            # The document before a piece of another one ends here, whatever token that piece begins with.
            labels[rows.starts[:, 1:]] = self.boundary_id
        label_bytes = int(self.token_byte_lengths.take(labels).sum())
        label_count = int(rows.valid.sum())
        if label_count < labels.size:
            # Padding is the boundary mark, which stands for no bytes, so label_bytes is right already.
            labels[np.arange(labels.shape[1]) >= rows.valid[:, None]] = IGNORED_LABEL
        if not self.predict_document_ends:
            ends = labels == self.boundary_id
            label_count -= int(ends.sum())
            labels[ends] = IGNORED_LABEL
        return Batch(
            tokens=torch.from_numpy(tokens[:, :-1].copy()),
            labels=torch.from_numpy(labels),
            document_starts=torch.from_numpy(starts[:, :-1].copy()),
            label_bytes=label_bytes,
            label_count=label_count,
            word_starts=None if words is None else torch.from_numpy((words | starts)[:, :-1].copy()),
        )
