"""Documents of a source, cut into shards: the same ones whoever reads, and however often it was broken off."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from data.errors import DataError
from data.preparation.digests import SeenDigests, digest_of
from data.source import Document, Source, Split
from data.splitting import identity_position

DEFAULT_SHARD_MEGABYTES = 256.0
# Documents are tokenized in groups of about this many bytes: enough for a tokenizer's threads to share.
GROUP_BYTES = 4 << 20
# And no more documents than this, where they are very short.
GROUP_DOCUMENTS = 1 << 16


@dataclass
class Group:
    """Documents of one shard that are tokenized together, in the source's order."""

    shard: int
    contents: list[bytes] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    # Of the last group of a shard: a hash of every document that was read for the shard, duplicates included.
    source_sha256: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether the shard ends with it."""
        return self.source_sha256 is not None


class ShardReader:
    """Reads a source once, from its first document to its last.

    A shard is the next documents, up to ``shard_bytes`` of raw text and at least one. What it holds depends on the
    source and on the arguments alone.

    Attributes:
        documents, bytes: read so far, duplicates included.
        duplicate_documents, duplicate_bytes: repeat an earlier document, byte for byte. Empty ones do not count.
        shards: begun so far.
    """

    def __init__(self, source: Source, held_out_fraction: float, deduplicate: bool, shard_bytes: int) -> None:
        """``deduplicate``: whether of equal documents only the first is kept."""
        self._source, self._fraction = source, held_out_fraction
        self._deduplicate, self._shard_bytes = deduplicate, shard_bytes
        self._seen = SeenDigests()
        self.documents = self.bytes = self.duplicate_documents = self.duplicate_bytes = self.shards = 0
        self._with_text: dict[Split, int] = {"train": 0, "held_out": 0}
        self._closest = 1.0  # the smallest fraction that would hold a document out

    def groups(self) -> Iterator[Group]:
        """All groups; those of a shard follow one another. Raises ``DataError`` where the source does."""
        group, group_bytes, shard_bytes = Group(0), 0, 0
        digest = hashlib.sha256()
        for documents in self._batches():
            digests = [digest_of(document.content) for document in documents]
            repeated = self._seen.add(digests).tolist()
            for document, its_digest, is_repeated in zip(documents, digests, repeated, strict=True):
                digest.update(its_digest)
                digest.update(document.identity.encode("utf-8", errors="surrogateescape") + b"\n")
                if is_repeated and document.content:
                    self.duplicate_documents += 1
                    self.duplicate_bytes += len(document.content)
                    if self._deduplicate:
                        continue
                self.shards = group.shard + 1
                group.contents.append(document.content)
                group.splits.append(self._split_of(document))
                group_bytes += len(document.content)
                shard_bytes += len(document.content)
                if shard_bytes >= self._shard_bytes:
                    group.source_sha256 = digest.hexdigest()
                    yield group
                    group, group_bytes, shard_bytes = Group(group.shard + 1), 0, 0
                    digest = hashlib.sha256()
                elif group_bytes >= GROUP_BYTES or len(group.contents) >= GROUP_DOCUMENTS:
                    yield group
                    group, group_bytes = Group(group.shard), 0
        if self.shards > group.shard:
            group.source_sha256 = digest.hexdigest()
            yield group

    def check_splits(self) -> None:
        """Raises ``DataError`` unless both splits have text; to be called behind the last group."""
        train, held_out = self._with_text["train"], self._with_text["held_out"]
        if held_out + train == 0:
            raise DataError(
                "data.source holds no document with any text; give a source with text in it"
                f" ({self.documents} empty documents were found)."
            )
        if train == 0:
            raise DataError(
                f"all {held_out} documents of data.source are held out; lower data.held_out_fraction,"
                " give more documents, or cut large files into documents (text_files has document_separator)."
            )
        if held_out == 0:
            needed = f"set data.held_out_fraction above {self._closest:.4f}, " if self._closest < 0.49 else ""
            raise DataError(
                f"none of the {train} documents of data.source falls into the held-out split at"
                f" data.held_out_fraction {self._fraction}; {needed}give more documents, or cut large"
                " files into documents (text_files has document_separator)."
            )

    def _split_of(self, document: Document) -> Split:
        position = identity_position(document.identity)
        split: Split = "held_out" if position < self._fraction else "train"
        if document.content:
            self._closest = min(self._closest, position)
            self._with_text[split] += 1
        return split

    def _batches(self) -> Iterator[list[Document]]:
        """The source's documents in lists of about ``GROUP_BYTES``."""
        batch: list[Document] = []
        size = 0
        for document in self._source.documents():
            batch.append(document)
            size += len(document.content)
            self.documents += 1
            self.bytes += len(document.content)
            if size >= GROUP_BYTES or len(batch) >= GROUP_DOCUMENTS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch
