"""Bytes in words, for models that read one vector a word (hierarchical autoregressive transformers)."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Sequence

import numpy as np

from data.errors import DataError
from data.tokenizers.base import WORD_START_FLAG
from data.tokenizers.byte_level import ByteTokenizer

# Long documents are split block by block, since each word is an object of its own. A line feed ends a word, and a
# word starts behind it, so a cut there changes none.
BLOCK_CHARACTERS = 1 << 20

# How Python's surrogateescape shows bytes that are not valid UTF-8.
_INVALID_BYTES = re.compile("([\udc80-\udcff]+)")


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

    def _encode(self, document: bytes) -> np.ndarray:
        ids = np.frombuffer(document, dtype=np.uint8).astype(np.uint16)
        lengths = np.array(self._word_lengths(document), dtype=np.int64)
        ids[np.cumsum(lengths) - lengths] += WORD_START_FLAG
        return ids

    def _word_lengths(self, document: bytes) -> list[int]:
        """The bytes of each word, in order."""
        lengths: list[int] = []
        text = document.decode("utf-8", errors="surrogateescape")
        # Every second part is what the expression matches.
        for number, part in enumerate(_INVALID_BYTES.split(text)):
            if number % 2:
                whole, rest = divmod(len(part), self.maximum_word_bytes)
                lengths += [self.maximum_word_bytes] * whole + [rest] * (rest > 0)
                continue
            for block in _blocks(part):
                words = self._splitter.split_with_limit(block, self.maximum_word_bytes)
                if b"".join(words) != block.encode():
                    raise DataError(
                        f"hat-splitter {_splitter_version()} does not keep every byte of {block[:40]!r}...; install"
                        " a version that does, or use data.tokenizer.type=bytes."
                    )
                lengths.extend(map(len, words))
        return lengths

    def fingerprint(self) -> str:
        # The version, because each comes with its own tables of Unicode.
        return f"hierarchical-bytes-words-{self.maximum_word_bytes}-hat-splitter-{_splitter_version()}"


def _splitter_version() -> str:
    return importlib.metadata.version("hat-splitter")


def _blocks(text: str) -> Iterator[str]:
    """``text`` in parts of about ``BLOCK_CHARACTERS``, each but the last ending with a line feed."""
    start = 0
    while start < len(text):
        found = text.find("\n", start + BLOCK_CHARACTERS - 1)
        end = len(text) if found < 0 else found + 1
        yield text[start:end]
        start = end
