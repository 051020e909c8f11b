"""Bytes in words, for models that read one vector a word (hierarchical autoregressive transformers)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import numpy as np

from data.errors import DataError
from data.tokenizers.base import WORD_START_FLAG
from data.tokenizers.byte_level import ByteTokenizer
from data.tokenizers.word_splitting import LostTextError, rest_of_character, word_lengths


class HierarchicalByteTokenizer(ByteTokenizer):
    """Ids 0 to 255 are the bytes, 256 is the boundary mark; stored ids also say where words start.

    The words are those of the ``hat-splitter`` package (Neitemeier et al. 2025, "Hierarchical Autoregressive
    Transformers", arXiv 2501.10322): Unicode's word bounds (UAX #29), cut also behind punctuation and in front of
    capitals, a word with the space before it and the punctuation behind it. Longer words than
    ``maximum_word_bytes`` are cut, between characters. A document's first byte starts a word, and so does each
    longest run of bytes that are not valid UTF-8.
    """

    word_start_flag = WORD_START_FLAG

    def __init__(self, maximum_word_bytes: int) -> None:
        """Raises ``DataError`` where ``hat-splitter`` is not installed."""
        try:
            import hat_splitter
        except ImportError as error:
            raise DataError(
                "data.tokenizer.type=hierarchical_bytes needs the package hat-splitter; install it (pip install"
                f" hat-splitter, which compiles it where there is no wheel for this machine), or use bytes ({error})."
            ) from error
        self.maximum_word_bytes = maximum_word_bytes
        self._splitter = hat_splitter.HATSplitter()

    def encode_many(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """uint16 ids: each byte, plus ``word_start_flag`` where it starts a word."""
        return [self._encode(document) for document in documents]

    def word_starts(self, text: bytes) -> np.ndarray:
        completed = text + rest_of_character(text)
        starts = np.zeros(len(completed), dtype=bool)
        starts[self._starts(completed)] = True
        return starts[: len(text)]

    def settled_bytes(self, text: bytes | bytearray) -> int:
        # A line feed ends a word, and a word starts behind it.
        return text.rfind(b"\n") + 1

    def _encode(self, document: bytes) -> np.ndarray:
        ids = np.frombuffer(document, dtype=np.uint8).astype(np.uint16)
        ids[self._starts(document)] += WORD_START_FLAG
        return ids

    def _starts(self, document: bytes) -> np.ndarray:
        """Where words start, in order, ``(words,)`` int64."""
        try:
            found = word_lengths(document, self._splitter, self.maximum_word_bytes)
        except LostTextError as error:
            raise DataError(
                f"hat-splitter {_splitter_version()} {error}; install a version that does, or use"
                " data.tokenizer.type=bytes."
            ) from error
        lengths = np.array(found, dtype=np.int64)
        return np.cumsum(lengths) - lengths

    def fingerprint(self) -> str:
        # The version, because each comes with its own tables of Unicode.
        return f"hierarchical-bytes-words-{self.maximum_word_bytes}-hat-splitter-{_splitter_version()}"


def _splitter_version() -> str:
    return importlib.metadata.version("hat-splitter")
