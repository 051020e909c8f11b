"""Tokenizers in sentencepiece's ``.model`` format."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from data.errors import DataError
from data.tokenizers.base import tokenizing_threads
from data.tokenizers.library_failures import told, told_of_text
from data.tokenizers.vocabulary import SPACE_STAND_IN, VocabularyTokenizer

# Raised whenever the same file gives other ids than before.
_ENCODING_VERSION = 2


class SentencePieceFileTokenizer(VocabularyTokenizer):
    """A trained sentencepiece model.

    Models with ``byte_fallback``, identity normalization and ``remove_extra_whitespaces=false`` keep every
    character; others normalise the text first, and then bytes are counted after normalisation. An unknown
    piece counts as no byte, which can only make bits per byte look worse.

    Control pieces are never made from text, and neither is the boundary mark, whatever piece it is. Symbols that the
    model calls user-defined stand for their text.
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
        with told(lambda reason: f"{file} is not a sentencepiece model ({reason}); give a .model file."):
            processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
            self.vocab_size = processor.get_piece_size()
            # Pieces that are no UTF-8 fail here, before anything is made of the others.
            pieces = [processor.id_to_piece(index) for index in range(self.vocab_size)]
        if self.vocab_size == 0:
            raise DataError(f"{file} is not a sentencepiece model (no pieces); give a .model file.")
        boundary_id = processor.piece_to_id(boundary_token)
        # What the model lacks has the id of the unknown piece, which there need not be.
        if not 0 <= boundary_id < self.vocab_size or pieces[boundary_id] != boundary_token:
            control_ids = filter(processor.is_control, range(self.vocab_size))
            control = [pieces[index] for index in control_ids][:8]
            raise DataError(
                f"the sentencepiece model {file} has no piece {boundary_token!r};"
                f" set data.tokenizer.boundary_token to one it has (its control pieces: {control or 'none'})."
            )
        self._boundary_token = boundary_token
        self.boundary_id = boundary_id
        self._used = self._model
        if processor.is_unknown(boundary_id) or processor.is_byte(boundary_id):
            self._reachable = {boundary_id: boundary_token}
        elif not processor.is_control(boundary_id):
            self._used = self._with_control_piece(file, processor)
            processor = sentencepiece.SentencePieceProcessor(model_proto=self._used)
        self._processor = processor
        self._id_bytes = [self._bytes_of(index) for index in range(self.vocab_size)]
        fallback = {self._id_bytes[index]: index for index in filter(processor.is_byte, range(self.vocab_size))}
        if fallback:
            stand_in = [fallback[bytes([byte])] for byte in SPACE_STAND_IN.encode()]
            self._stand_in_ids = np.array(stand_in, dtype=np.uint32)
        first = _encode_with(processor, ["a"])[0]
        self._adds_leading_space = len(first) > 0 and self._id_bytes[first[0]].startswith(b" ")

    def _with_control_piece(self, file: Path, processor: sentencepiece.SentencePieceProcessor) -> bytes:
        """The model with the boundary mark as a control piece, so that no text is encoded to it."""
        text = self._boundary_token.replace(SPACE_STAND_IN, " ")
        if len(text) == 1 and not any(map(processor.is_byte, range(self.vocab_size))):
            raise DataError(
                f"the boundary token {self._boundary_token!r} is the only piece of the sentencepiece model {file} for"
                " that character; set data.tokenizer.boundary_token to a control piece."
            )
        proto = ModelProto.FromString(self._model)
        proto.pieces[self.boundary_id].type = ModelProto.SentencePiece.CONTROL
        return proto.SerializeToString()

    def _bytes_of(self, index: int) -> bytes:
        processor = self._processor
        if index == self.boundary_id or processor.is_control(index) or processor.is_unknown(index):
            return b""
        piece = processor.id_to_piece(index)
        if processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_STAND_IN, " ").encode()

    @functools.cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        """The same model, without the space in front of a text."""
        proto = ModelProto.FromString(self._used)
        proto.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        return _encode_with(self._processor, texts)

    def _encode_continuations(self, texts: list[str]) -> list[np.ndarray]:
        return _encode_with(self._continuing if self._adds_leading_space else self._processor, texts)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._model).hexdigest()
        content = [_ENCODING_VERSION, sentencepiece.__version__, self._boundary_token, digest]
        return "sentencepiece-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _encode_with(processor: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[np.ndarray]:
    with told_of_text():
        encoded = processor.encode(texts, return_type="numpy", num_threads=tokenizing_threads())
    return [ids.view(np.uint32) for ids in encoded]
