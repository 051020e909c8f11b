"""Documents as text, and what data amounts to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, MegatronIndexedSource, PreparedSource
from data.documents import SPLITS, SplitCounts, StoredDocuments
from data.errors import DataError
from data.preparation.manifest import MANIFEST_FILE, Manifest
from data.prepare import cached_directory, prepare
from data.prepared import open_directory
from data.source import Split
from data.sources import open_source
from data.splitting import held_out
from data.tokenizers import Tokenizer, open_tokenizer

# No character of UTF-8 takes more bytes, and no token but a special one stands for less than a byte.
_BYTES_OF_CHARACTER = 4


@dataclass(frozen=True)
class ShownDocument:
    """One document, or its beginning."""

    number: int  # within its split
    tokens: int | None  # the mark counted; None where only the beginning was tokenized
    text: str
    is_cut: bool


@dataclass(frozen=True)
class Inspection:
    """What was found in one source.

    Attributes:
        counts: of both splits; None for text that is not tokenized yet, which nobody has counted.
        manifest: of a prepared directory.
    """

    name: str
    counts: dict[Split, SplitCounts] | None
    manifest: Manifest | None
    documents: list[ShownDocument]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries, without the list of shards."""
        manifest = self.manifest.model_dump(mode="json", exclude=set(_NOT_SHOWN)) if self.manifest else None
        if manifest is not None:
            manifest["shards"] = len(self.manifest.shards)
        counts = {split: asdict(counts) for split, counts in self.counts.items()} if self.counts else None
        return {
            "name": self.name,
            "counts": counts,
            "manifest": manifest,
            "documents": [asdict(document) for document in self.documents],
        }


_NOT_SHOWN = frozenset({"shards", *SPLITS})


@dataclass(frozen=True)
class Shown:
    """Which documents are shown, and how much of each."""

    split: Split = "train"
    first: int = 0
    documents: int = 3
    characters: int = 400


def inspect_directory(name: str, directory: Path, shown: Shown) -> Inspection:
    """A prepared directory, decoded by the tokenizer that it names.

    Raises ``DataError`` where it is unfinished or damaged, or its tokenizer cannot be opened.
    """
    manifest, splits = open_directory(directory)
    if shown.documents:
        tokenizer = open_tokenizer(manifest.tokenizer_in(directory))
        documents = _shown(splits[shown.split], tokenizer, shown)
    else:
        documents = []
    return Inspection(name, _counts(splits), manifest, documents)


def inspect_config(name: str, config: DataConfig, shown: Shown) -> Inspection:
    """The only source of ``config``: what is tokenized, or else the text itself. Tokenizes no more than it shows.

    Raises ``DataError`` for bad sources, tokenizers and prepared files.
    """
    tokenizer = open_tokenizer(config.tokenizer)
    if isinstance(config.source, PreparedSource):
        prepare(config, tokenizer)  # which compares the tokenizers
        return inspect_directory(name, Path(config.source.path).expanduser(), shown)
    if isinstance(config.source, MegatronIndexedSource):
        splits = prepare(config, tokenizer)
        return Inspection(name, _counts(splits), None, _shown(splits[shown.split], tokenizer, shown))
    if config.cache_directory is not None:
        directory = cached_directory(config, tokenizer)
        if (directory / MANIFEST_FILE).is_file():
            return inspect_directory(name, directory, shown)
    return Inspection(name, None, None, _shown_text(config, tokenizer, shown))


def _counts(splits: Mapping[Split, StoredDocuments]) -> dict[Split, SplitCounts]:
    return {split: splits[split].counts for split in SPLITS}


def _shown(documents: StoredDocuments, tokenizer: Tokenizer, shown: Shown) -> list[ShownDocument]:
    count = len(documents.lengths)
    if shown.documents and shown.first >= count:
        raise DataError(
            f"the {shown.split.replace('_', '-')} split has {count} documents, so the first one to show must be a"
            f" number from 0 to {count - 1}, but it is {shown.first}."
        )
    found = []
    for number in range(shown.first, min(shown.first + shown.documents, count)):
        length = int(documents.lengths[number])
        ids = np.empty(min(length, 1 + _BYTES_OF_CHARACTER * (shown.characters + 1)), dtype=np.int64)
        documents.read(number, 0, ids)
        text = tokenizer.decode_text(ids)
        is_cut = len(ids) < length or len(text) > shown.characters
        found.append(ShownDocument(number, length, text[: shown.characters], is_cut))
    return found


def _shown_text(config: DataConfig, tokenizer: Tokenizer, shown: Shown) -> list[ShownDocument]:
    found: list[ShownDocument] = []
    number = 0
    if not shown.documents:
        return found
    for document in open_source(config.source).documents():
        is_held_out = held_out(document.identity, config.held_out_fraction)
        if not document.content or is_held_out != (shown.split == "held_out"):
            continue
        if number >= shown.first:
            beginning = document.content[: _BYTES_OF_CHARACTER * (shown.characters + 1)]
            is_whole = len(beginning) == len(document.content)
            ids = tokenizer.encode(beginning)
            text = tokenizer.decode_text(ids)
            is_cut = not is_whole or len(text) > shown.characters
            tokens = 1 + len(ids) if is_whole else None
            found.append(ShownDocument(number, tokens, text[: shown.characters], is_cut))
        number += 1
        if len(found) == shown.documents:
            break
    if not found:
        raise DataError(
            f"data.source has {number} documents with text in the {shown.split.replace('_', '-')} split, so none is"
            f" number {shown.first}; show another split or an earlier document."
        )
    return found
