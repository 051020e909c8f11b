"""Tokenizers behind one interface: bytes in, ids out, and how many bytes each id stands for."""

from __future__ import annotations

from data.config import (
    BytesTokenizer,
    HierarchicalBytesTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TokenizerConfig,
)
from data.tokenizers.base import Tokenizer


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that ``config`` describes.

    Raises ``DataError`` when its file is missing or damaged, or has no ``boundary_token``, or its package is missing.
    """
    match config:
        case BytesTokenizer():
            from data.tokenizers.byte_level import ByteTokenizer

            return ByteTokenizer()
        case HierarchicalBytesTokenizer():
            from data.tokenizers.hierarchical_bytes import HierarchicalByteTokenizer

            return HierarchicalByteTokenizer(config.maximum_word_bytes)
        case HuggingFaceTokenizer():
            from data.tokenizers.huggingface import HuggingFaceFileTokenizer

            return HuggingFaceFileTokenizer(config.path, config.boundary_token)
        case SentencePieceTokenizer():
            from data.tokenizers.sentencepiece import SentencePieceFileTokenizer

            return SentencePieceFileTokenizer(config.path, config.boundary_token)
    raise AssertionError(f"tokenizer {config!r} is in the schema but not here")


__all__ = ["Tokenizer", "open_tokenizer"]
