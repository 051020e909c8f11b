"""Prepares a source in memory, for this process alone."""

from __future__ import annotations

import hashlib
import io

import numpy as np

from data.config import DataConfig
from data.documents import SPLITS, SplitCounts, TokenizedDocuments, content_fingerprint, token_dtype
from data.preparation.encoding import EncodedPart, encode_group
from data.preparation.plan import Options
from data.preparation.reading import ShardReader
from data.source import Split
from data.sources import open_source
from data.tokenizers import Tokenizer


class MemorySplit:
    """What a directory would hold of one split, shard behind shard."""

    def __init__(self) -> None:
        self.content = io.BytesIO()
        self.lengths: list[np.ndarray] = []
        self.bytes = self.empty = self.invalid = 0
        self.checksums: list[str] = []
        self._digest = hashlib.sha256()
        self._shard_is_empty = True

    def add(self, part: EncodedPart) -> None:
        content = memoryview(part.tokens).cast("B") if len(part.tokens) else b""
        self.content.write(content)
        self._digest.update(content)
        self._shard_is_empty &= not len(part.tokens)
        self.lengths.append(part.lengths)
        self.bytes += part.bytes
        self.empty += part.empty_documents
        self.invalid += part.invalid_utf8_documents

    def end_shard(self) -> None:
        if not self._shard_is_empty:
            self.checksums.append(self._digest.hexdigest())
        self._digest, self._shard_is_empty = hashlib.sha256(), True

    def documents(self, dtype: np.dtype) -> TokenizedDocuments:
        tokens = np.frombuffer(self.content.getbuffer(), dtype=dtype)
        offsets = np.cumsum(np.concatenate([[0], *self.lengths]), dtype=np.int64)
        counts = SplitCounts(
            documents=len(offsets) - 1,
            tokens=len(tokens),
            bytes=self.bytes,
            empty_documents=self.empty,
            invalid_utf8_documents=self.invalid,
            sha256=content_fingerprint(self.checksums),
        )
        return TokenizedDocuments(tokens, offsets, counts)


def prepare_in_memory(config: DataConfig, tokenizer: Tokenizer, options: Options) -> dict[Split, TokenizedDocuments]:
    """The documents that a directory prepared with these options would hold, of the only source of ``config``."""
    reader = ShardReader(open_source(config.source), config.held_out_fraction, options.deduplicate, options.shard_bytes)
    splits = {split: MemorySplit() for split in SPLITS}
    for group in reader.groups():
        for split, part in encode_group(group, tokenizer).items():
            splits[split].add(part)
            if group.is_last:
                splits[split].end_shard()
    reader.check_splits()
    dtype = token_dtype(tokenizer.stored_vocab_size)
    return {split: memory.documents(dtype) for split, memory in splits.items()}
