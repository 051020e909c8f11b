"""Bytes in words, for models that read one vector a word (hierarchical autoregressive transformers)."""

from __future__ import annotations

import codecs
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

# Of UTF-8 (RFC 3629): two first bytes allow fewer second ones than the others do.
_HIGHEST_SECOND_BYTE = {0xED: 0x9F, 0xF4: 0x8F}
_HIGHEST_BYTE = 0xBF

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

    def word_starts(self, text: bytes) -> np.ndarray:
        completed = text + _rest_of_character(text)
        starts = np.zeros(len(completed), dtype=bool)
        starts[self._starts(completed)] = True
        return starts[: len(text)]

    def settled_bytes(self, text: bytes | bytearray) -> int:
        # See BLOCK_CHARACTERS.
        return text.rfind(b"\n") + 1

    def _encode(self, document: bytes) -> np.ndarray:
        ids = np.frombuffer(document, dtype=np.uint8).astype(np.uint16)
        ids[self._starts(document)] += WORD_START_FLAG
        return ids

    def _starts(self, document: bytes) -> np.ndarray:
        """Where words start, in order, ``(words,)`` int64."""
        lengths = np.array(self._word_lengths(document), dtype=np.int64)
        return np.cumsum(lengths) - lengths

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


def _rest_of_character(text: bytes) -> bytes:
    """The highest bytes that complete a character which ``text`` ends within; none where it ends within none.

    Which character it will be is not known yet. One that begins with the same byte is more often cut as it will be
    than bytes that are not valid UTF-8 are: the first byte says much about the script.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    # A character has four bytes at most.
    decoder.decode(text[-4:])
    begun, _ = decoder.getstate()
    if not begun:
        return b""
    length = 2 + (begun[0] >= 0xE0) + (begun[0] >= 0xF0)
    rest = bytearray([_HIGHEST_BYTE] * (length - len(begun)))
    if len(begun) == 1:
        rest[0] = _HIGHEST_SECOND_BYTE.get(begun[0], _HIGHEST_BYTE)
    return bytes(rest)


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
