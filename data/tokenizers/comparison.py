"""What a tokenizer makes of some text: how many tokens, how fast, and whether all of it comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import DataError
from data.tokenizers.base import Tokenizer, split_word_starts

# Documents are encoded in groups of about this many bytes, as they are in preparing a source.
_GROUP_BYTES = 4 << 20


@dataclass(frozen=True)
class TokenizerFigures:
    """One tokenizer on some documents. ``tokens`` counts no boundary marks."""

    name: str
    vocab_size: int
    documents: int
    bytes: int
    tokens: int
    words: int | None  # None where the tokenizer knows none
    seconds: float  # of encoding, wall time
    changed_documents: int  # that decoding does not give back byte for byte

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def bytes_per_word(self) -> float | None:
        return self.bytes / self.words if self.words else None

    @property
    def megabytes_per_second(self) -> float:
        return self.bytes / 1e6 / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokenizer": self.name,
            "vocab_size": self.vocab_size,
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes_per_token,
            "bytes_per_word": self.bytes_per_word,
            "encode_megabytes_per_second": self.megabytes_per_second,
            "changed_documents": self.changed_documents,
        }


def measure_tokenizer(name: str, tokenizer: Tokenizer, documents: Sequence[bytes]) -> TokenizerFigures:
    """Encodes and decodes ``documents``. Raises ``DataError`` where the tokenizer does, or makes no token of them."""
    if documents:
        # The first call starts threads, and fills tables that later calls find filled.
        tokenizer.encode_many([documents[0][:_GROUP_BYTES]])
    tokens = words = changed = 0
    seconds = 0.0
    for group in _groups(documents):
        begin = time.perf_counter()
        encoded = tokenizer.encode_many(group)
        seconds += time.perf_counter() - begin
        for document, ids in zip(group, encoded, strict=True):
            tokens += len(ids)
            changed += tokenizer.decode(ids) != document
            if tokenizer.word_start_flag is not None:
                words += int(np.count_nonzero(split_word_starts(ids)[1]))
    if not tokens:
        raise DataError(f"{name} makes no token of the text; give other text or another tokenizer.")
    return TokenizerFigures(
        name=name,
        vocab_size=tokenizer.vocab_size,
        documents=len(documents),
        bytes=sum(map(len, documents)),
        tokens=tokens,
        words=None if tokenizer.word_start_flag is None else words,
        seconds=seconds,
        changed_documents=changed,
    )


def _groups(documents: Sequence[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
