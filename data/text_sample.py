"""A part of a source's text that is spread over all of it: what a tokenizer is trained on, or compared on."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from data.config import ONLY_SOURCE, DataConfig, SourceConfig
from data.errors import DataError
from data.source import Split
from data.sources import open_source
from data.splitting import held_out, identity_position


@dataclass(frozen=True)
class TextSample:
    """Documents of one split, in the source's order, and what there is of that split in all."""

    documents: list[bytes]
    source_documents: int
    source_bytes: int

    @property
    def bytes(self) -> int:
        return sum(map(len, self.documents))


class _Sample:
    """Every document whose random place lies below a threshold, the highest at which their text fits."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.source_documents = self.source_bytes = self._kept_bytes = 0
        self._threshold = 1.0
        self._kept: list[tuple[float, int, bytes]] = []  # a heap, the highest place first

    def add(self, identity: str, content: bytes) -> None:
        number = self.source_documents
        self.source_documents += 1
        self.source_bytes += len(content)
        # Not the place that decides the split: that of held-out documents is low.
        place = identity_position(f"sample\0{identity}")
        if place >= self._threshold:
            return
        content = _cut(content, self.limit)
        heapq.heappush(self._kept, (-place, number, content))
        self._kept_bytes += len(content)
        while self._kept_bytes > self.limit and len(self._kept) > 1:
            dropped, _, text = heapq.heappop(self._kept)
            self._threshold = -dropped
            self._kept_bytes -= len(text)

    def result(self) -> TextSample:
        documents = [content for _, _, content in sorted(self._kept, key=lambda kept: kept[1])]
        return TextSample(documents, self.source_documents, self.source_bytes)


def _cut(content: bytes, limit: int) -> bytes:
    """The first ``limit`` bytes, or a few fewer so that no character is cut."""
    end = limit
    while 0 < end < len(content) and end > limit - 4 and content[end] & 0xC0 == 0x80:
        end -= 1
    return content[:end]


def sample_text(
    config: DataConfig,
    limits: Mapping[Split, int],
    read_limit: int | None = None,
    progress: Callable[[str, int], None] = lambda name, size: None,
) -> dict[str, dict[Split, TextSample]]:
    """Text of each source of ``config``, by the source's name (``ONLY_SOURCE`` without a mixture) and split.

    The source is read once. Of more text than the limit a part is kept that is spread evenly over everything that was
    read: it depends on the documents' identities alone, neither on chance nor on their order. Sources of a mixture
    share the limits by their weights at the run's beginning; one that has less than its share gives all that it has.

    Args:
        config: names the source or mixture, and which documents are held out.
        limits: of the splits that are wanted, how many bytes of text at most; at least 1.
        read_limit: the reading of a mixture's source ends with the document at which so many bytes, times its share,
            were read; None: at its end.
        progress: called with the source's name and the bytes that were read of it, document by document.

    Raises:
        DataError: a source holds no text, or cannot be read.
    """
    if config.mixture is None:
        sources = {ONLY_SOURCE: (config.source, 1.0)}
    else:
        total = sum(entry.weight for entry in config.mixture.values())
        sources = {name: (entry.source, entry.weight / total) for name, entry in config.mixture.items()}
    samples = {}
    for name, (source, share) in sources.items():
        own_limits = {split: max(1, int(limit * share)) for split, limit in limits.items()}
        own_read_limit = None if read_limit is None else read_limit * share
        try:
            samples[name] = _sample_source(
                source,
                config.held_out_fraction,
                own_limits,
                own_read_limit,
                lambda size, name=name: progress(name, size),
            )
        except DataError as error:
            raise DataError(f"data.mixture.{name}: {error}" if config.mixture else str(error)) from error
    return samples


def _sample_source(
    config: SourceConfig,
    held_out_fraction: float,
    limits: Mapping[Split, int],
    read_limit: float | None,
    progress: Callable[[int], None],
) -> dict[Split, TextSample]:
    samples = {split: _Sample(limit) for split, limit in limits.items()}
    size = 0
    for document in open_source(config).documents():
        split: Split = "held_out" if held_out(document.identity, held_out_fraction) else "train"
        if split in samples and document.content:
            samples[split].add(document.identity, document.content)
        size += len(document.content)
        progress(size)
        if read_limit is not None and size >= read_limit:
            break
    if size == 0:
        raise DataError("data.source holds no document with any text; give a source with text in it.")
    return {split: sample.result() for split, sample in samples.items()}
