"""Tokenizers in Hugging Face's ``tokenizer.json`` format, through the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data.errors import DataError
from data.tokenizers.base import VocabularyTokenizer

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_SPACE = "\u2581"


class HuggingFaceFileTokenizer(VocabularyTokenizer):
    """Byte-level (GPT-2 style) and sentencepiece-style tokenizers.

    Others (WordPiece, whole words) lose parts of the text, so neither decoding nor bits per byte would be
    right; they are refused.
    """

    def __init__(self, path: str, boundary_token: str) -> None:
        """Raises ``DataError``: no such tokenizer, damaged file, unfit kind, no ``boundary_token``."""
        library = _open_library_tokenizer(path)
        # A saved file may ask for truncation or padding, which would lose or invent text.
        library.no_truncation()
        library.no_padding()
        # Text that spells a special token is text: only this package places marks.
        library.encode_special_tokens = True
        boundary_id = library.token_to_id(boundary_token)
        added = library.get_added_tokens_decoder()
        if boundary_id is None:
            specials = [token.content for token in added.values() if token.special][:8]
            raise DataError(
                f"the tokenizer {path} has no token {boundary_token!r}; set data.tokenizer.boundary_token to"
                f" one that it has (its special tokens: {specials or 'none'})."
            )
        vocabulary = library.get_vocab(with_added_tokens=True)
        self._library = library
        self._boundary_token = boundary_token
        self.boundary_id = boundary_id
        self.vocab_size = max(vocabulary.values()) + 1
        self._id_bytes = [b""] * self.vocab_size
        to_bytes = _token_to_bytes(path, library)
        for token, index in vocabulary.items():
            if index not in added:
                self._id_bytes[index] = to_bytes(token)
            elif not added[index].special:
                self._id_bytes[index] = token.encode()
        self._id_bytes[boundary_id] = b""
        first = library.encode("a", add_special_tokens=False).ids
        self._adds_leading_space = bool(first) and self._id_bytes[first[0]].startswith(b" ")

    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def fingerprint(self) -> str:
        content = [tokenizers.__version__, self._boundary_token, self._library.to_str()]
        return "huggingface-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _open_library_tokenizer(path: str) -> tokenizers.Tokenizer:
    local = Path(path).expanduser()
    file = local / "tokenizer.json" if local.is_dir() else local
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file} is not a tokenizer.json ({error}); save the tokenizer again.") from error
    if local.is_dir():
        raise DataError(f"{file} does not exist; data.tokenizer.path must hold a tokenizer.json.")
    if local.suffix == ".json" or not _HUB_NAME.fullmatch(path):
        raise DataError(
            f"data.tokenizer.path {path} does not exist; give a tokenizer.json, a directory that holds one,"
            " or a model name on the Hugging Face hub."
        )
    try:
        return tokenizers.Tokenizer.from_pretrained(path)
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"data.tokenizer.path {path} is no local file, and the Hugging Face hub gave no tokenizer of that"
            f" name ({error}); give the path of a tokenizer.json."
        ) from error


def _component_types(component: Any) -> Iterator[str]:
    """The ``type`` of every part of a tokenizer.json section, sequences included."""
    if isinstance(component, dict):
        if "type" in component:
            yield component["type"]
        for value in component.values():
            yield from _component_types(value)
    elif isinstance(component, list):
        for value in component:
            yield from _component_types(value)


def _token_to_bytes(path: str, library: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """A function from a token's spelling in the vocabulary to the bytes that it stands for."""
    description = json.loads(library.to_str())
    decoder = set(_component_types(description["decoder"]))
    before = set(_component_types([description["pre_tokenizer"], description["normalizer"]]))
    if "ByteLevel" in decoder | before:
        alphabet = byte_level_alphabet()

        def from_byte_level(token: str) -> bytes:
            if all(character in alphabet for character in token):
                return bytes(alphabet[character] for character in token)
            return token.encode()

        return from_byte_level
    if decoder & {"Metaspace", "ByteFallback"}:
        return sentencepiece_bytes
    model = description["model"]["type"]
    raise DataError(
        f"the tokenizer {path} (model {model}, decoder {sorted(decoder) or 'none'}) does"
        " not keep every byte of the text; use a byte-level or a sentencepiece-style tokenizer."
    )


def sentencepiece_bytes(token: str) -> bytes:
    """The bytes that a sentencepiece-style token stands for: U+2581 is a space, ``<0xAB>`` the byte AB."""
    fallback = _BYTE_FALLBACK.fullmatch(token)
    if fallback:
        return bytes([int(fallback.group(1), 16)])
    return token.replace(_SENTENCEPIECE_SPACE, " ").encode()


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: character -> byte.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    alphabet.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return alphabet
