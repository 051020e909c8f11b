"""What a preparation would write, from the configuration, the source and the tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import DataConfig, HuggingFaceSource, SourceConfig, TokenizerConfig
from data.documents import token_dtype
from data.errors import DataError
from data.preparation.manifest import FileRecord, Plan
from data.preparation.reading import DEFAULT_SHARD_MEGABYTES
from data.source import Source
from data.tokenizers import Tokenizer

# Settings of a source that say where it lies. What lies there is in its fingerprint.
_PLACES = frozenset({"path", "data_files"})


@dataclass(frozen=True)
class Options:
    """What a preparation may be told besides the ``data`` section.

    Attributes:
        deduplicate: whether of equal documents only the first is kept.
        shard_megabytes: raw text (10^6 bytes) after which a shard ends.
    """

    deduplicate: bool
    shard_megabytes: float = DEFAULT_SHARD_MEGABYTES

    def __post_init__(self) -> None:
        if not 1e-6 <= self.shard_megabytes < float("inf"):
            raise DataError(f"shard-megabytes is {self.shard_megabytes}; give the megabytes of text of a shard.")

    @property
    def shard_bytes(self) -> int:
        return int(self.shard_megabytes * 10**6)


def make_plan(config: DataConfig, source: Source, tokenizer: Tokenizer, options: Options) -> tuple[Plan, bytes | None]:
    """The plan for a configuration of one source, and the content of the tokenizer's file, where it has one here."""
    tokenizer_config, content, record = config.tokenizer, _tokenizer_file(config.tokenizer), None
    if content is not None:
        name = "tokenizer.json" if tokenizer_config.type == "huggingface" else "tokenizer.model"
        tokenizer_config = tokenizer_config.model_copy(update={"path": name})
        record = FileRecord(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    plan = Plan(
        source=_settings(config.source),
        source_fingerprint=source.fingerprint(),
        tokenizer=tokenizer_config,
        tokenizer_file=record,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        stored_vocab_size=tokenizer.stored_vocab_size,
        boundary_id=tokenizer.boundary_id,
        dtype=token_dtype(tokenizer.stored_vocab_size).name,
        held_out_fraction=config.held_out_fraction,
        deduplicate=options.deduplicate,
        shard_megabytes=options.shard_megabytes,
    )
    return plan, content


def _settings(source: SourceConfig) -> dict[str, Any]:
    """The source's settings but for places on this machine; the name of a dataset on the hub is none."""
    settings = source.model_dump(mode="json", exclude=set(_PLACES))
    if isinstance(source, HuggingFaceSource) and not Path(source.path).expanduser().exists():
        settings["path"] = source.path
    return settings


def _tokenizer_file(config: TokenizerConfig) -> bytes | None:
    """The content of the tokenizer's file; None for one that has none, or is on the hub."""
    place = getattr(config, "path", None)
    if place is None:
        return None
    path = Path(place).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    return path.read_bytes() if path.is_file() else None
