"""The part that tokenizers with a vocabulary file share: ids to bytes, and text that spells special tokens."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np

from data.errors import DataError
from data.tokenizers.base import Tokenizer

# Sentencepiece, and tokenizers made after it, write a space as this character.
SPACE_STAND_IN = "\u2581"
_STAND_INS = re.compile(f"{SPACE_STAND_IN}+")


class VocabularyTokenizer(Tokenizer):
    """A tokenizer whose ids each stand for a fixed string of bytes.

    A subclass implements ``_encode_texts`` and ``_encode_continuations`` and sets:

    ``_id_bytes``: the bytes of every id; b"" for special tokens.
    ``_boundary_token``: how the boundary mark is spelled.
    ``_adds_leading_space``: whether a space is put in front of every text.
    ``_stand_in_ids``: the ids of the three bytes of U+2581, where the tokenizer would take that character for a
    space and has ids for bytes; otherwise None.
    ``_reachable``: special tokens that text can encode to although nothing recognises them in text, as id ->
    spelling; most tokenizers have none.
    ``_unknown_id``: among those the id of text that there is no token for, unless it is the mark.
    """

    reads_text = True
    _id_bytes: list[bytes]
    _boundary_token: str
    _adds_leading_space: bool
    _stand_in_ids: np.ndarray | None = None
    _reachable: dict[int, str] = {}
    _unknown_id: int | None = None

    @abstractmethod
    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text; special tokens are neither added nor recognised."""

    @abstractmethod
    def _encode_continuations(self, texts: list[str]) -> list[np.ndarray]:
        """The same without the space that the tokenizer may put in front of a text."""

    def encode_many(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        texts = [document.decode("utf-8", errors="replace") for document in documents]
        encoded = self._encode_texts(texts)
        for index, text in enumerate(texts):
            if self._stand_in_ids is not None and SPACE_STAND_IN in text or self._special_in(encoded[index]):
                encoded[index] = self._encode_in_parts(text)
        return encoded

    def _special_in(self, ids: np.ndarray) -> list[int]:
        """The special tokens among ``ids``."""
        if not self._reachable:
            return []
        return np.unique(ids[np.isin(ids, list(self._reachable))]).tolist()

    def _encode_in_parts(self, text: str) -> np.ndarray:
        """Encodes a text in which every spelling of a special token is cut in two, and U+2581 becomes its bytes.

        Raises ``DataError`` where the text encodes to a special token even so.
        """
        spelled = {
            found + 1
            for spelling in self._reachable.values()
            if len(spelling) > 1
            for found in _occurrences(text, spelling)
        }
        # A normalizer may make the spelling only afterwards. Single characters are no spelling of anything longer.
        for cuts in (spelled, range(1, len(text))):
            ids = np.concatenate([np.zeros(0, np.uint32), *self._encode_parts(text, cuts)])
            reached = [self._reachable[token] for token in self._special_in(ids) if token != self._unknown_id]
            if not reached:
                return ids
        name = "boundary token" if reached[0] == self._boundary_token else "special token"
        raise DataError(
            f"the text encodes to the {name} {reached[0]!r}, which would then not be told from text;"
            " set data.tokenizer.boundary_token to a special token of the tokenizer that no text spells, or use"
            " another tokenizer."
        )

    def _encode_parts(self, text: str, cuts: Iterable[int]) -> list[np.ndarray]:
        """The ids of the parts of ``text`` between ``cuts``, in order."""
        bounds = {0, len(text), *cuts}
        if self._stand_in_ids is not None:
            bounds.update(edge for run in _STAND_INS.finditer(text) for edge in run.span())
        ordered = sorted(bounds)
        parts = [text[start:end] for start, end in zip(ordered, ordered[1:], strict=False)]
        encoded = self._encode_texts(parts[:1]) + self._encode_continuations(parts[1:])
        if self._stand_in_ids is not None:
            encoded = [
                np.tile(self._stand_in_ids, len(part)) if part.startswith(SPACE_STAND_IN) else ids
                for part, ids in zip(parts, encoded, strict=True)
            ]
        return encoded

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        table = self._id_bytes
        tokens = self._checked(ids).tolist()
        if not self._adds_leading_space:
            return b"".join([table[token] for token in tokens])
        decoded = []
        at_start = True
        for token in tokens:
            piece = table[token]
            if at_start and piece:
                # The tokenizer put this space in front of the document itself.
                piece = piece.removeprefix(b" ")
                at_start = False
            if token == self.boundary_id:
                at_start = True
            decoded.append(piece)
        return b"".join(decoded)

    def token_byte_lengths(self) -> np.ndarray:
        return np.fromiter((len(piece) for piece in self._id_bytes), dtype=np.int64, count=self.vocab_size)


def _occurrences(text: str, wanted: str) -> Iterable[int]:
    """Where ``wanted`` stands in ``text``, overlapping ones too."""
    found = text.find(wanted)
    while found >= 0:
        yield found
        found = text.find(wanted, found + 1)
