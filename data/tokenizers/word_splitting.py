"""Where words start in bytes, by a splitter of characters.

Shipped with exported models too, so it imports nothing beside the standard library.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Protocol

# Long documents are split block by block, since each word is an object of its own. A line feed ends a word, and a
# word starts behind it, so a cut there changes none.
BLOCK_CHARACTERS = 1 << 20

# Of UTF-8 (RFC 3629): two first bytes allow fewer second ones than the others do.
_HIGHEST_SECOND_BYTE = {0xED: 0x9F, 0xF4: 0x8F}
_HIGHEST_BYTE = 0xBF

# How Python's surrogateescape shows bytes that are not valid UTF-8.
_INVALID_BYTES = re.compile("([\udc80-\udcff]+)")


class LostTextError(ValueError):
    """A splitter's words are not the text that they were cut from."""


class Splitter(Protocol):
    """``hat_splitter.HATSplitter``."""

    def split_with_limit(self, text: str, max_bytes: int) -> list[bytes]:
        """The words of ``text``, none longer than that."""


def word_lengths(document: bytes, splitter: Splitter, maximum_word_bytes: int) -> list[int]:
    """The bytes of each word of a document, in order.

    Each longest run of bytes that are not valid UTF-8 is a word, or several where it is longer than a word may be.

    Raises:
        LostTextError: the splitter's words are not the text; the message says that it "does not keep" it.
    """
    lengths: list[int] = []
    text = document.decode("utf-8", errors="surrogateescape")
    # Every second part is what the expression matches.
    for number, part in enumerate(_INVALID_BYTES.split(text)):
        if number % 2:
            whole, rest = divmod(len(part), maximum_word_bytes)
            lengths += [maximum_word_bytes] * whole + [rest] * (rest > 0)
            continue
        for block in _blocks(part):
            words = splitter.split_with_limit(block, maximum_word_bytes)
            if b"".join(words) != block.encode():
                raise LostTextError(f"does not keep every byte of {block[:40]!r}...")
            lengths.extend(map(len, words))
    return lengths


def _blocks(text: str) -> Iterator[str]:
    """``text`` in parts of about ``BLOCK_CHARACTERS``, each but the last ending with a line feed."""
    start = 0
    while start < len(text):
        found = text.find("\n", start + BLOCK_CHARACTERS - 1)
        end = len(text) if found < 0 else found + 1
        yield text[start:end]
        start = end


def rest_of_character(text: bytes) -> bytes:
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
