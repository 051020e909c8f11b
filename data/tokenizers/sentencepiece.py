"""Tokenizers in sentencepiece's ``.model`` format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import sentencepiece

from data.errors import DataError
from data.tokenizers.base import VocabularyTokenizer


class SentencePieceFileTokenizer(VocabularyTokenizer):
    """A trained sentencepiece model.

    Models with ``byte_fallback``, identity normalization and ``remove_extra_whitespaces=false`` keep every
    character; others normalise the text first, and then bytes are counted after normalisation. An unknown
    piece counts as no byte, which can only make bits per byte look worse.
    """

    def __init__(self, path: str, boundary_token: str) -> None:
        """Raises ``DataError``: no such file, not a model, no ``boundary_token``."""
        file = Path(path).expanduser()
        try:
            self._model = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"data.tokenizer.path {file} cannot be read ({error.strerror}); give a .model file."
            ) from error
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
            self.vocab_size = self._processor.get_piece_size()
        except Exception as error:  # the library raises RuntimeError or its own types, by version
            raise DataError(f"{file} is not a sentencepiece model ({error}); give a .model file.") from error
        if self.vocab_size == 0:
            raise DataError(f"{file} is not a sentencepiece model (no pieces); give a .model file.")
        boundary_id = self._processor.piece_to_id(boundary_token)
        if self._processor.id_to_piece(boundary_id) != boundary_token:
            control_ids = filter(self._processor.is_control, range(self.vocab_size))
            control = [self._processor.id_to_piece(index) for index in control_ids][:8]
            raise DataError(
                f"the sentencepiece model {file} has no piece {boundary_token!r};"
                f" set data.tokenizer.boundary_token to one it has (its control pieces: {control or 'none'})."
            )
        self._boundary_token = boundary_token
        self.boundary_id = boundary_id
        self._id_bytes = [self._bytes_of(index) for index in range(self.vocab_size)]
        first = self._processor.encode("a")
        self._adds_leading_space = bool(first) and self._id_bytes[first[0]].startswith(b" ")

    def _bytes_of(self, index: int) -> bytes:
        processor = self._processor
        if index == self.boundary_id or processor.is_control(index) or processor.is_unknown(index):
            return b""
        piece = processor.id_to_piece(index)
        if processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.uint32) for ids in self._processor.encode(texts)]

    def fingerprint(self) -> str:
        content = [sentencepiece.__version__, self._boundary_token, hashlib.sha256(self._model).hexdigest()]
        return "sentencepiece-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()
