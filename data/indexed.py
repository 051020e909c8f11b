"""Reads token ids from Megatron's indexed datasets (``.bin`` and ``.idx``)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.config import MegatronIndexedSource
from data.errors import DataError
from data.sources import Document, Split, fingerprint_files

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset


class IndexedDocuments:
    """The documents of one indexed dataset, and of a second one where the held-out split has its own."""

    def __init__(self, config: MegatronIndexedSource) -> None:
        self.datasets: list[tuple[str, Split | None]] = [(config.path_prefix, None)]
        if config.held_out_path_prefix is not None:
            self.datasets = [(config.path_prefix, "train"), (config.held_out_path_prefix, "held_out")]
        self.files = []
        for prefix, _ in self.datasets:
            for suffix in (".idx", ".bin"):
                path = Path(prefix + suffix)
                if not path.is_file():
                    raise DataError(
                        f"{path} does not exist; an indexed dataset is a .idx and a .bin file, named in the"
                        " config by their path without the ending."
                    )
                self.files.append((str(path), path))

    def documents(self) -> Iterator[Document]:
        for prefix, split in self.datasets:
            dataset = open_indexed_dataset(prefix)
            bounds = np.asarray(dataset.document_indices)
            for number, (first, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
                sequences = [dataset[int(i)] for i in range(first, end) if dataset.sequence_lengths[i]]
                # np.concatenate copies, so the ids outlive the dataset's memory map.
                ids = np.concatenate(sequences) if sequences else np.zeros(0, dtype=np.int64)
                yield Document(f"document/{number}", f"{prefix}.bin document {number}", ids, split)

    def fingerprint(self) -> str:
        return fingerprint_files(self.files, "megatron_indexed", *(str(split) for _, split in self.datasets))


def open_indexed_dataset(prefix: str) -> IndexedDataset:
    """Megatron's reader of ``prefix``. Raises ``DataError`` for a damaged index or a ``.bin`` cut short."""
    with warnings.catch_warnings():
        # Importing Megatron warns about each optional package that it does without.
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    try:
        dataset = IndexedDataset(prefix)
    except Exception as error:
        # Megatron asserts, and struct, numpy and mmap raise their own, so any exception here means the files.
        raise DataError(
            f"{prefix}.idx and {prefix}.bin cannot be opened as an indexed dataset ({error or 'bad index'});"
            " write them again."
        ) from error
    expected = int(dataset.sequence_lengths.sum(dtype=np.int64)) * dataset.index.dtype_size
    actual = Path(prefix + ".bin").stat().st_size
    if actual != expected:
        raise DataError(f"{prefix}.bin has {actual} bytes but its index says {expected}; copy or write the pair again.")
    return dataset
