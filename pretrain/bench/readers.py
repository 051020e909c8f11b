"""What ``bench data`` times: batches of one tokenized corpus, by our reader and by others.

Every reader gives ``(batch, sequence)`` int64 tensors of tokens and labels. Ours also says where documents begin and to
which of them each token belongs; the others do not, unless their row says so.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.config import DataConfig
from data.dataset import Data, open_data
from pretrain.bench.contestants import Contestant, PeerMissing

VOCABULARY = 256
MARK = 256
MEAN_DOCUMENT = 600
SEED = 0


@dataclass(frozen=True)
class Corpus:
    """Random tokens on disk in Megatron's indexed format, and in parquet for the readers that want rows.

    Attributes:
        prefix: of the ``.bin`` and ``.idx``; documents of very different lengths, a mark behind each.
        documents, tokens: how many there are, marks counted.
        rows: parquet files whose rows are whole samples, of fewer tokens: that reader is slow.
    """

    directory: Path
    prefix: str
    documents: int
    tokens: int
    rows: str


@dataclass(frozen=True)
class Reading:
    """Sizes of what is timed."""

    batch_size: int = 8
    sequence_length: int = 2048
    batches: int = 64  # of one timing

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Importing Megatron-core warns about each optional package that it does without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def make_corpus(tokens: int, reading: Reading, rows: int = 2048) -> Iterator[Corpus]:
    """A corpus of about ``tokens`` tokens in a temporary directory, removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="bench-data-"))
    try:
        yield _write_corpus(directory, tokens, reading, rows)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write_corpus(directory: Path, tokens: int, reading: Reading, rows: int) -> Corpus:
    import pyarrow
    import pyarrow.parquet

    with _quietly():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    random = np.random.default_rng(SEED)
    lengths = np.maximum(random.lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1.0, tokens // MEAN_DOCUMENT + 1), 2).astype(int)
    ids = random.integers(0, VOCABULARY, int(lengths.sum()), dtype=np.uint16)
    ends = np.cumsum(lengths)
    ids[ends - 1] = MARK
    prefix = str(directory / "corpus")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for begin, end in zip(ends - lengths, ends, strict=True):
        builder.add_document(torch.from_numpy(ids[begin:end].astype(np.int32)), [int(end - begin)])
    builder.finalize(prefix + ".idx")
    width = reading.sequence_length + 1
    table = pyarrow.table({"tokens": list(ids[: min(rows, len(ids) // width) * width].reshape(-1, width))})
    pyarrow.parquet.write_table(table, directory / "rows.parquet")
    return Corpus(directory, prefix, len(lengths), len(ids), str(directory / "rows.parquet"))


def open_ours(corpus: Corpus, reading: Reading, **settings: Any) -> Data:
    """Our reader over the corpus."""
    config = DataConfig.model_validate(
        {
            "source": {"type": "megatron_indexed", "path_prefix": corpus.prefix},
            "tokenizer": {"type": "bytes"},
            "sequence_length": reading.sequence_length,
            "held_out_fraction": 0.01,
            **settings,
        }
    )
    return open_data(config, SEED)


def _contestant(name: str, reading: Reading, read: Callable[[], object]) -> Contestant:
    def run() -> None:
        for _ in range(reading.batches):
            read()

    return Contestant(name, run, lambda: None, reading.tokens * reading.batches)


def ours(corpus: Corpus, reading: Reading, packing: str) -> Contestant:
    """Our samples with document starts, segment ids, and the bytes that labels stand for."""
    data = open_ours(corpus, reading, packing=packing)
    position = itertools.count(0, reading.batch_size)

    def read() -> object:
        first = next(position)
        batch = data.train.batch(range(first, first + reading.batch_size))
        return batch, batch.segment_ids

    return _contestant({"concatenate": "ours", "best_fit": "ours, whole documents"}[packing], reading, read)


def bare_memory_map(corpus: Corpus, reading: Reading) -> Contestant:
    """The limit: random places of the file, a batch at a time, and nothing else."""
    ids = np.asarray(np.memmap(corpus.prefix + ".bin", dtype=np.uint16, mode="r"))
    random = np.random.default_rng(SEED)
    length = reading.sequence_length

    def read() -> object:
        starts = random.integers(0, len(ids) - length - 1, reading.batch_size)
        rows = np.empty((reading.batch_size, length + 1), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            row[:] = ids[start : start + length + 1]
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())

    return _contestant("bare memory map", reading, read)


def megatron(corpus: Corpus, reading: Reading, documents: bool) -> Contestant:
    """Megatron-core's ``GPTDataset``; with ``documents`` its positions and dense masks restart at each."""
    with _quietly():
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split
    samples = reading.batch_size * reading.batches * 64
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=reading.sequence_length,
        split="1,0,0",
        path_to_cache=str(corpus.directory / "megatron"),
        tokenizer=_MegatronTokenizer(),
        reset_position_ids=documents,
        reset_attention_mask=documents,
        eod_mask_loss=False,
        create_attention_mask=documents,
        mid_level_dataset_surplus=0.005,
    )
    indexed = IndexedDataset(corpus.prefix)
    everything = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, corpus.prefix, everything, samples, Split.train, config)
    position = itertools.count(0, reading.batch_size)

    def read() -> object:
        first = next(position) % (len(dataset) - reading.batch_size)
        rows = [dataset[index] for index in range(first, first + reading.batch_size)]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    name = "Megatron GPTDataset" + (", positions and dense masks by document" if documents else "")
    return _contestant(name, reading, read)


class _MegatronTokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod, pad, vocab_size = MARK, MARK, VOCABULARY + 1
    unique_identifiers = {"class": "bytes"}


def hugging_face(corpus: Corpus, reading: Reading) -> Contestant:
    """``datasets``, streaming rows that are samples already."""
    import datasets

    stream = datasets.load_dataset("parquet", data_files=corpus.rows, split="train", streaming=True)
    stream = stream.with_format("numpy")

    def batches() -> Iterator[object]:
        while True:
            for rows in stream.iter(batch_size=reading.batch_size, drop_last_batch=True):
                tokens = torch.from_numpy(np.stack(rows["tokens"]).astype(np.int64))
                yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    iterator = batches()
    return _contestant("datasets, streaming tokenized parquet", reading, lambda: next(iterator))


def mosaic(corpus: Corpus, reading: Reading) -> Contestant:
    """mosaicml-streaming, samples written as arrays. Raises ``PeerMissing``."""
    try:
        streaming = importlib.import_module("streaming")
    except ImportError as error:
        raise PeerMissing(f"not installed ({error})") from None
    directory = corpus.directory / "mosaic"
    ids = np.memmap(corpus.prefix + ".bin", dtype=np.uint16, mode="r")
    width = reading.sequence_length + 1
    with streaming.MDSWriter(out=str(directory), columns={"tokens": f"ndarray:uint16:{width}"}) as writer:
        for start in range(0, min(2048 * width, len(ids) - width), width):
            writer.write({"tokens": np.asarray(ids[start : start + width])})
    dataset = streaming.StreamingDataset(local=str(directory), batch_size=reading.batch_size, shuffle=True)
    return _contestant("mosaicml-streaming", reading, _endless(dataset, reading, lambda sample: sample["tokens"]))


def litdata(corpus: Corpus, reading: Reading) -> Contestant:
    """litdata's token loader. Raises ``PeerMissing``."""
    try:
        package = importlib.import_module("litdata")
        loader = importlib.import_module("litdata.streaming.item_loader")
    except ImportError as error:
        raise PeerMissing(f"not installed ({error})") from None
    directory = corpus.directory / "litdata"
    ids = np.asarray(np.memmap(corpus.prefix + ".bin", dtype=np.uint16, mode="r"))
    width = reading.sequence_length + 1
    pieces = [ids[start : start + width] for start in range(0, min(2048 * width, len(ids) - width), width)]
    package.optimize(_as_tensor, pieces, str(directory), chunk_size=width * 512, num_workers=1,
                     item_loader=loader.TokensLoader(block_size=width))  # fmt: skip
    dataset = package.StreamingDataset(str(directory), item_loader=loader.TokensLoader(block_size=width), shuffle=True)
    return _contestant("litdata TokensLoader", reading, _endless(dataset, reading, lambda sample: sample))


def _as_tensor(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tokens.astype(np.int32))


def _endless(dataset: Any, reading: Reading, tokens_of: Callable[[Any], Any]) -> Callable[[], object]:
    """Batches of a dataset that is begun anew at its end."""

    def samples() -> Iterator[torch.Tensor]:
        while True:
            for sample in dataset:
                yield torch.as_tensor(np.asarray(tokens_of(sample))).long()

    iterator = samples()

    def read() -> object:
        rows = torch.stack([next(iterator) for _ in range(reading.batch_size)])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return read
