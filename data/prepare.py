"""Documents -> token ids, split by identity, kept on disk for the next start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from data.config import DataConfig, MegatronIndexedSource, PreparedSource
from data.documents import StoredDocuments
from data.errors import DataError
from data.indexed import open_indexed
from data.preparation.directory import prepare_directory
from data.preparation.manifest import FORMAT_VERSION
from data.preparation.memory import prepare_in_memory
from data.preparation.plan import Options
from data.prepared import open_directory, open_prepared
from data.source import Split
from data.sources import open_source
from data.tokenizers import Tokenizer, open_tokenizer

# A run reads every document that its source has; leaving out duplicates is asked for when text is prepared by hand.
_OPTIONS = Options(deduplicate=False)


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None) -> Mapping[Split, StoredDocuments]:
    """Tokenizes the source, or opens what an earlier start has prepared in ``config.cache_directory``.

    A source that is tokenized already is read where it lies. The cache holds prepared directories; what a start that
    was broken off has finished of one is kept. This process tokenizes alone, with the threads of the tokenizer's
    library: large corpora are prepared sooner beforehand, by several processes.

    Any number of processes may call this at once: one does the work, the others wait for it (where the file
    system has no locks each does it, and all write the same).
    Raises ``DataError`` for bad sources, tokenizers and prepared files.
    """
    tokenizer = tokenizer or open_tokenizer(config.tokenizer)
    if isinstance(config.source, MegatronIndexedSource):
        return open_indexed(config.source, tokenizer, config.held_out_fraction)
    if isinstance(config.source, PreparedSource):
        return open_prepared(config.source, tokenizer)
    if config.cache_directory is None:
        return prepare_in_memory(config, tokenizer, _OPTIONS)
    directory = cached_directory(config, tokenizer)
    try:
        prepare_directory(config, tokenizer, directory, _OPTIONS)
    except OSError as error:
        raise DataError(
            f"data.cache_directory {config.cache_directory} cannot be written ({error.strerror or error}); give a"
            " writable directory with enough room, or null to tokenize in memory."
        ) from error
    return open_directory(directory)[1]


def cached_directory(config: DataConfig, tokenizer: Tokenizer) -> Path:
    """Where ``config.cache_directory`` holds the only source of ``config``, prepared or not yet."""
    source = open_source(config.source)
    parts = [FORMAT_VERSION, source.fingerprint(), tokenizer.fingerprint(), config.held_out_fraction]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return Path(config.cache_directory or "").expanduser() / f"prepared-{key}"
