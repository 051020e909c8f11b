"""What every tokenizer offers, and where the starts of words stand in stored ids."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from data.errors import DataError
from data.processes import usable_cores

# Tokenizers of bytes: ids 0 to 255 are the bytes, and this is the boundary mark.
BYTES_BOUNDARY_ID = 256
# Added to the stored id of a byte that starts a word.
WORD_START_FLAG = 257


class Tokenizer(ABC):
    """Turns the bytes of a document into ids and back.

    ``boundary_id`` marks where a document starts. No text encodes to it, whatever the text spells.

    What is stored are the model's ids, below ``vocab_size``, but for tokenizers that cut text into words: theirs
    also say where words start, so that this is decided once, when a document is tokenized.
    """

    vocab_size: int
    boundary_id: int
    # Whether encode reads UTF-8 text: bytes that are not valid UTF-8 become U+FFFD. False keeps every byte.
    reads_text: bool
    # Added to a stored id that starts a word, see split_word_starts; None where stored ids are the model's.
    word_start_flag: int | None = None

    @property
    def stored_vocab_size(self) -> int:
        """Every stored id lies below this: twice ``vocab_size`` where ids say where words start."""
        return self.vocab_size if self.word_start_flag is None else 2 * self.word_start_flag

    @abstractmethod
    def encode_many(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """The stored ids of each document, without the boundary mark."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ``ids``, stored or the model's, stand for; special tokens such as the mark stand for none.

        Raises ``DataError`` for an id outside the vocabulary.
        """

    @abstractmethod
    def token_byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: the bytes that each id of the model stands for; 0 for special tokens."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the same text may be given other ids."""

    def encode(self, text: bytes | str) -> np.ndarray:
        """The stored ids of one document, (number of tokens,), without the boundary mark."""
        content = text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else text
        return self.encode_many([content])[0]

    def word_starts(self, text: bytes) -> np.ndarray:
        """Which bytes of a text so far start words, ``(bytes,)`` bool; the next byte may change what its end says.

        A document's stored ids say the same, but where it ends within a character.

        Raises:
            DataError: this tokenizer does not cut text into words.
        """
        raise DataError(
            f"{type(self).__name__} does not cut text into words; use data.tokenizer.type=hierarchical_bytes."
        )

    def settled_bytes(self, text: bytes | bytearray) -> int:
        """So many bytes at the beginning of a text so far start the words that they start, whatever follows.

        The rest is cut as if it were a text of its own.
        """
        return 0

    def model_ids(self, ids: np.ndarray) -> np.ndarray:
        """The ids that a model reads for stored ``ids``, of the same shape."""
        return ids if self.word_start_flag is None else split_word_starts(ids)[0]

    def decode_text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Like ``decode``, as text; bytes that are not valid UTF-8 are shown as U+FFFD."""
        return self.decode(ids).decode("utf-8", errors="replace")

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """``ids`` as the model's, (number of tokens,) int64."""
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        size = self.stored_vocab_size
        if array.size and (array.min() < 0 or array.max() >= size):
            outside = int(array[(array < 0) | (array >= size)][0])
            raise DataError(
                f"id {outside} is outside the tokenizer's vocabulary of {size} ids;"
                " decode with the tokenizer that wrote the ids."
            )
        return self.model_ids(array)


def split_word_starts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored ids of a tokenizer of bytes and words as the model's ids and the starts of words.

    A byte that starts a word is stored as its id + ``WORD_START_FLAG``. The boundary mark starts a word, of which
    it is all, and is stored as it is.

    Args:
        rows: stored ids, any shape and integer type.

    Returns:
        The model's ids, of the same shape and type, and bool of the same shape: whether a word starts there.
    """
    flagged = rows >= WORD_START_FLAG
    tokens = rows - flagged * rows.dtype.type(WORD_START_FLAG)
    return tokens, flagged | (tokens == BYTES_BOUNDARY_ID)


def tokenizing_threads() -> int:
    """How many threads a call may tokenize with: every core that this process may use, or fewer if so told.

    ``TOKENIZERS_PARALLELISM=false`` and ``RAYON_NUM_THREADS``, which the ``tokenizers`` library reads, mean the
    same for every tokenizer here.
    """
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("", "on", "true", "t", "yes", "y", "1"):
        cores = usable_cores()
        asked = os.environ.get("RAYON_NUM_THREADS", "")
        return min(int(asked), cores) if asked.isdecimal() and int(asked) > 0 else cores
    return 1
