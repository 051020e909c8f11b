"""Tokenizers in Hugging Face's ``tokenizer.json`` format, through the ``tokenizers`` library."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data.errors import DataError
from data.tokenizers.library_failures import told, told_of_text
from data.tokenizers.vocabulary import SPACE_STAND_IN, VocabularyTokenizer

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# No vocabulary has so many tokens; the library makes room for every id up to the largest, and ends the process where
# there is none.
_LARGEST_ID = 2**22 - 1
# Raised whenever the same file gives other ids than before.
_ENCODING_VERSION = 2


class HuggingFaceFileTokenizer(VocabularyTokenizer):
    """Byte-level (GPT-2 style) and sentencepiece-style tokenizers.

    Others (WordPiece, whole words) lose parts of the text, so neither decoding nor bits per byte would be
    right; they are refused.

    Tokens that the file calls special are never made from text, and neither is the boundary mark, special or not.
    Added tokens that are not special stand for their text, and the spaces around them stay. A file whose tokenizer
    normalizes text, or puts a space only in front of texts that have none (sentencepiece style, as ``transformers``
    writes it), encodes texts that differ in just that to the same ids.
    """

    def __init__(self, path: str, boundary_token: str) -> None:
        """Raises ``DataError``: no such tokenizer, damaged file, unfit kind, no ``boundary_token``."""
        library = open_library_tokenizer(path)
        boundary_id = library.token_to_id(boundary_token)
        if boundary_id is None:
            specials = [token.content for token in library.get_added_tokens_decoder().values() if token.special][:8]
            raise DataError(
                f"the tokenizer {path} has no token {boundary_token!r}; set data.tokenizer.boundary_token to"
                f" one that it has (its special tokens: {specials or 'none'})."
            )
        description = json.loads(library.to_str())
        to_bytes = _token_to_bytes(path, description)
        if _mend_added_tokens(description, boundary_token):
            library = tokenizers.Tokenizer.from_str(json.dumps(description))
        # Text that spells a special token is text: only this package places marks.
        library.encode_special_tokens = True
        vocabulary = library.get_vocab(with_added_tokens=True)
        self._library = library
        self._description = description
        self._boundary_token = boundary_token
        self.boundary_id = boundary_id
        self.vocab_size = max(vocabulary.values()) + 1
        self._id_bytes = [b""] * self.vocab_size
        added = library.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special} | {boundary_id}
        reachable = _reachable_ids(description) & special
        for token, index in vocabulary.items():
            if index == boundary_id or index in special and index not in reachable:
                continue
            content = to_bytes(token) if index not in added or index in reachable else token.encode()
            # One character has no spelling that could be cut, so it is the text itself.
            if index not in special or len(content.decode(errors="replace")) == 1:
                self._id_bytes[index] = content
        self._reachable = {
            index: to_bytes(library.id_to_token(index)).decode(errors="replace")
            for index in sorted(reachable)
            if index == boundary_id or not self._id_bytes[index]
        }
        unknown_id = _unknown_id(description)
        self._unknown_id = None if unknown_id == boundary_id else unknown_id
        if to_bytes is sentencepiece_bytes and description["model"].get("byte_fallback"):
            fallback = [vocabulary.get(f"<0x{byte:02X}>") for byte in SPACE_STAND_IN.encode()]
            self._stand_in_ids = None if None in fallback else np.array(fallback, dtype=np.uint32)
        first = _encode_with(library, ["a"])[0]
        self._adds_leading_space = len(first) > 0 and self._id_bytes[first[0]].startswith(b" ")

    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        return _encode_with(self._library, texts)

    def _encode_continuations(self, texts: list[str]) -> list[np.ndarray]:
        return _encode_with(self._continuing if self._adds_leading_space else self._library, texts)

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The same tokenizer, without the space in front of a text."""
        library = tokenizers.Tokenizer.from_str(json.dumps(_without_leading_space(self._description)))
        library.encode_special_tokens = True
        return library

    def fingerprint(self) -> str:
        content = [_ENCODING_VERSION, tokenizers.__version__, self._boundary_token, self._library.to_str()]
        return "huggingface-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _encode_with(library: tokenizers.Tokenizer, texts: list[str]) -> list[np.ndarray]:
    with told_of_text():
        encodings = library.encode_batch_fast(texts, add_special_tokens=False)
    # numpy takes twice as long to read a list of numbers.
    return [np.frombuffer(array("I", encoding.ids), dtype=np.uint32) for encoding in encodings]


def open_library_tokenizer(path: str) -> tokenizers.Tokenizer:
    """The ``tokenizers`` library's object for a file, a directory or a hub name, whole texts in and out.

    Raises ``DataError``: no such tokenizer, a damaged file, or one that the library could not work with.
    """
    library = _read_library_tokenizer(path)
    largest = max(library.get_vocab(with_added_tokens=True).values(), default=0)
    if largest > _LARGEST_ID:
        raise DataError(
            f"the tokenizer {path} has the id {largest}, where at most {_LARGEST_ID} is expected; number its tokens"
            " without gaps."
        )
    # A saved file may ask for truncation or padding, which would lose or invent text.
    library.no_truncation()
    library.no_padding()
    return library


def _read_library_tokenizer(path: str) -> tokenizers.Tokenizer:
    local = Path(path).expanduser()
    file = local / "tokenizer.json" if local.is_dir() else local
    if file.is_file():
        with told(lambda reason: f"{file} is not a tokenizer.json ({reason}); save the tokenizer again."):
            return tokenizers.Tokenizer.from_file(str(file))
    if local.is_dir():
        raise DataError(f"{file} does not exist; data.tokenizer.path must hold a tokenizer.json.")
    if local.suffix == ".json" or not _HUB_NAME.fullmatch(path):
        raise DataError(
            f"data.tokenizer.path {path} does not exist; give a tokenizer.json, a directory that holds one,"
            " or a model name on the Hugging Face hub."
        )
    with told(
        lambda reason: (
            f"data.tokenizer.path {path} is no local file, and the Hugging Face hub gave no tokenizer of that"
            f" name ({reason}); give the path of a tokenizer.json."
        )
    ):
        return tokenizers.Tokenizer.from_pretrained(path)


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


def _mend_added_tokens(description: dict[str, Any], boundary_token: str) -> bool:
    """Whether added tokens had to change so that no text is lost and none becomes the mark."""
    changed = False
    for token in description["added_tokens"]:
        is_boundary = token["content"] == boundary_token
        if not token["special"] and (token["lstrip"] or token["rstrip"] or is_boundary):
            # The library would take the spaces around the token for a part of it.
            token.update(lstrip=False, rstrip=False, special=is_boundary)
            changed = True
    return changed


def _reachable_ids(description: dict[str, Any]) -> set[int]:
    """Ids that the model itself can make from text, whether or not added tokens are recognised in it."""
    model = description["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return set(range(len(vocabulary)))
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return set(vocabulary.values())
    merged = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]}
    return {index for token, index in vocabulary.items() if token in merged or len(token) == 1}


def _unknown_id(description: dict[str, Any]) -> int | None:
    """The id of text that the model has no token for; None where it has none."""
    model = description["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    vocabulary = model["vocab"]
    return vocabulary.get(model.get("unk_token")) if isinstance(vocabulary, dict) else None


def _without_leading_space(component: Any) -> Any:
    """A tokenizer.json, or a section of it, in which nothing puts a space in front of a text."""
    if isinstance(component, list):
        return [_without_leading_space(value) for value in component if not _prepends(value)]
    if not isinstance(component, dict):
        return component
    settings = {key: None if _prepends(value) else _without_leading_space(value) for key, value in component.items()}
    if settings.get("type") == "Metaspace":
        settings["prepend_scheme"] = "never"
    if settings.get("type") == "ByteLevel":
        settings["add_prefix_space"] = False
    return settings


def _prepends(component: Any) -> bool:
    return isinstance(component, dict) and component.get("type") == "Prepend"


def _token_to_bytes(path: str, description: dict[str, Any]) -> Callable[[str], bytes]:
    """A function from a token's spelling in the vocabulary to the bytes that it stands for."""
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
    return token.replace(SPACE_STAND_IN, " ").encode()


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: character -> byte.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    alphabet.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return alphabet
