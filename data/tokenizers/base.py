"""What every tokenizer offers, and the parts that tokenizers with a vocabulary file share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from data.errors import DataError


class Tokenizer(ABC):
    """Turns the bytes of a document into ids and back.

    ``boundary_id`` marks where a document starts. No text encodes to it, whatever the text spells.
    """

    vocab_size: int
    boundary_id: int
    # Whether encode reads UTF-8 text: bytes that are not valid UTF-8 become U+FFFD. False keeps every byte.
    reads_text: bool

    @abstractmethod
    def encode_many(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each document, without the boundary mark."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ``ids`` stand for; the boundary mark and other special tokens stand for none.

        Raises ``DataError`` for an id outside the vocabulary.
        """

    @abstractmethod
    def token_byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: the bytes that each id stands for; 0 for special tokens."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the same text may be given other ids."""

    def encode(self, text: bytes | str) -> np.ndarray:
        """The ids of one document, (number of tokens,), without the boundary mark."""
        content = text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else text
        return self.encode_many([content])[0]

    def decode_text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Like ``decode``, as text; bytes that are not valid UTF-8 are shown as U+FFFD."""
        return self.decode(ids).decode("utf-8", errors="replace")

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            outside = int(array[(array < 0) | (array >= self.vocab_size)][0])
            raise DataError(
                f"id {outside} is outside the tokenizer's vocabulary of {self.vocab_size} ids;"
                " decode with the tokenizer that wrote the ids."
            )
        return array


class VocabularyTokenizer(Tokenizer):
    """A tokenizer whose ids each stand for a fixed string of bytes.

    A subclass sets ``_boundary_token`` (its spelling), ``_id_bytes`` (the bytes of every id, b"" for special
    tokens) and ``_adds_leading_space``, and implements ``_encode_texts``.
    """

    reads_text = True
    _boundary_token: str
    _id_bytes: list[bytes]
    _adds_leading_space: bool

    @abstractmethod
    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text; special tokens are not added, nor recognised where that can be avoided."""

    def encode_many(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        texts = [document.decode("utf-8", errors="replace") for document in documents]
        encoded = self._encode_texts(texts)
        for index, ids in enumerate(encoded):
            if np.any(ids == self.boundary_id):
                encoded[index] = self._encode_around_boundary(texts[index])
        return encoded

    def _encode_around_boundary(self, text: str) -> np.ndarray:
        """Encodes a text that spells the mark by cutting every spelling of it in two.

        Needed where the mark is an ordinary entry of the vocabulary, not a special token.
        """
        token = self._boundary_token
        pieces = []
        start = 0
        while (found := text.find(token, start)) >= 0:
            pieces.append(text[start : found + 1])
            start = found + 1
        ids = np.concatenate(self._encode_texts([*pieces, text[start:]]))
        if np.any(ids == self.boundary_id):
            raise DataError(
                f"the text encodes to the boundary token {token!r}, so it cannot mark where documents start;"
                " set data.tokenizer.boundary_token to a special token of the tokenizer."
            )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        table = self._id_bytes
        decoded = []
        at_start = self._adds_leading_space
        for token in self._checked(ids).tolist():
            piece = table[token]
            if at_start and piece:
                # The tokenizer put this space in front of the document itself.
                piece = piece.removeprefix(b" ")
                at_start = False
            if token == self.boundary_id:
                at_start = self._adds_leading_space
            decoded.append(piece)
        return b"".join(decoded)

    def token_byte_lengths(self) -> np.ndarray:
        return np.fromiter((len(piece) for piece in self._id_bytes), dtype=np.int64, count=self.vocab_size)
