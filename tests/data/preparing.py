"""Prepares small corpora for tests, and compares what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig
from data.documents import StoredDocuments
from data.preparation.directory import OnProgress, prepare_directory
from data.preparation.manifest import Manifest
from data.preparation.plan import Options
from data.tokenizers import open_tokenizer


def data_config(source: dict[str, Any], **settings: Any) -> DataConfig:
    """A configuration of bytes; ``settings`` are further keys of ``data``."""
    raw = {"source": source, "tokenizer": {"type": "bytes"}, "sequence_length": 32, "held_out_fraction": 0.2}
    return DataConfig.model_validate(raw | settings)


def text_config(path: Path, **settings: Any) -> DataConfig:
    """A configuration of the text files below ``path``."""
    return data_config({"type": "text_files", "path": str(path)}, **settings)


def write_texts(directory: Path, count: int = 40, size: int = 500, seed: int = 0) -> Path:
    """``count`` files of different random bytes, ``size`` or so each."""
    generator = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        content = generator.integers(32, 127, generator.integers(size // 2, size * 2), dtype=np.uint8)
        (directory / f"{number:04}.txt").write_bytes(content.tobytes())
    return directory


def prepare_into(
    directory: Path,
    config: DataConfig,
    *,
    workers: int = 0,
    on_progress: OnProgress = lambda state: None,
    deduplicate: bool = True,
    shard_megabytes: float = 0.004,
) -> Manifest:
    """Prepares ``config``; the default cuts :func:`write_texts` into several shards."""
    tokenizer = open_tokenizer(config.tokenizer)
    options = Options(deduplicate, shard_megabytes)
    return prepare_directory(config, tokenizer, directory, options, workers, on_progress)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by name."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*")}


def all_documents(documents: StoredDocuments) -> list[list[int]]:
    """The ids of every document, marks included."""
    found = []
    for number, length in enumerate(documents.lengths.tolist()):
        ids = np.empty(length, dtype=np.int64)
        documents.read(number, 0, ids)
        found.append(ids.tolist())
    return found
