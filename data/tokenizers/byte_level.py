"""Bytes as tokens: no vocabulary to train, every file is representable, round trips are exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.tokenizers.base import BYTES_BOUNDARY_ID, Tokenizer


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes; 256 is the boundary mark."""

    vocab_size = 257
    boundary_id = BYTES_BOUNDARY_ID
    reads_text = False

    def encode_many(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Views of the documents as uint8 ids: nothing is copied."""
        return [np.frombuffer(document, dtype=np.uint8) for document in documents]

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        array = self._checked(ids)
        return array[array < BYTES_BOUNDARY_ID].astype(np.uint8).tobytes()

    def token_byte_lengths(self) -> np.ndarray:
        lengths = np.ones(self.vocab_size, dtype=np.int64)
        lengths[BYTES_BOUNDARY_ID] = 0
        return lengths

    def fingerprint(self) -> str:
        return "bytes-257"
