"""``bench data``: how fast batches come, how fast a run starts, how fast text becomes tokens; peers beside us.

As in ``bench train`` each round times everyone once, and ratios are taken within a round.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.config import HuggingFaceTokenizer, StandardLibrarySource
from data.sources import open_source
from data.tokenizers import open_tokenizer
from pretrain.bench import readers
from pretrain.bench.contestants import Contestant, PeerMissing
from pretrain.bench.readers import Corpus, Reading
from pretrain.bench.train import Measurement, machine, time_once

Say = Callable[[str], None]

# For each reader, what part of a timing's batches it reads: the slow ones would hold up the others.
PEERS: dict[str, tuple[Callable[[Corpus, Reading], Contestant], int]] = {
    "Megatron GPTDataset": (lambda corpus, reading: readers.megatron(corpus, reading, documents=False), 1),
    "Megatron GPTDataset, by document": (lambda corpus, reading: readers.megatron(corpus, reading, documents=True), 32),
    "datasets": (readers.hugging_face, 4),
    "mosaicml-streaming": (readers.mosaic, 8),
    "litdata": (readers.litdata, 1),
}


@dataclass(frozen=True)
class DataBenchmark:
    """Everything measured.

    Attributes:
        corpus: what was read; its files are gone.
        reading: sizes.
        rows: readers, ours (concatenated) first and the bare memory map last.
        first_start, later_start: seconds until the first batch is there, the file's pages in memory, and again.
        encoding: text to ids, bytes counted as ``tokens``: our tokenizer, and its library alone.
    """

    corpus: Corpus
    reading: Reading
    rows: tuple[Measurement, ...]
    first_start: float
    later_start: float
    encoding: tuple[Measurement, ...]

    def ratios(self, row: Measurement) -> list[float]:
        """Tokens/s of ours over a row's, in each round."""
        ours = self.rows[0]
        return [
            (ours.tokens / own) / (row.tokens / other) for own, other in zip(ours.seconds, row.seconds, strict=False)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, every round's."""
        return {
            **machine(),
            "tokens": self.corpus.tokens,
            "documents": self.corpus.documents,
            "reading": vars(self.reading),
            "first_start_seconds": self.first_start,
            "later_start_seconds": self.later_start,
            "rows": {row.name: _plain(row) | {"ratios": self.ratios(row)} for row in self.rows},
            "encoding": {row.name: _plain(row) for row in self.encoding},
        }


def _plain(row: Measurement) -> dict[str, Any]:
    return {"missing": row.missing, "per_second": row.tokens_per_second(), "processor_seconds": row.processor_seconds}


def bench_data(
    tokens: int, reading: Reading, text_bytes: int, rounds: int, say: Say = lambda text: None
) -> DataBenchmark:
    """Measures readers on a corpus of about ``tokens`` random tokens, and tokenizers on ``text_bytes`` of real text."""
    say(f"writing {tokens:,} random tokens")
    with readers.make_corpus(tokens, reading) as corpus:
        starts = [_seconds_to_first_batch(corpus, reading) for _ in range(2)]
        found = list(_contestants(corpus, reading))
        rows = _measure(found, rounds, say)
    with tempfile.TemporaryDirectory(prefix="bench-tokenizer-") as directory:
        say("training a tokenizer of 4,096 entries on the standard library")
        encoding = _measure(list(_encoders(Path(directory), text_bytes)), rounds, say)
    return DataBenchmark(corpus, reading, rows, starts[0], starts[1], encoding)


def _seconds_to_first_batch(corpus: Corpus, reading: Reading) -> float:
    began = time.perf_counter()
    readers.open_ours(corpus, reading).train.batch(range(reading.batch_size))
    return time.perf_counter() - began


def _contestants(corpus: Corpus, reading: Reading) -> Iterator[Contestant | Measurement]:
    yield readers.ours(corpus, reading, "concatenate")
    yield readers.ours(corpus, reading, "best_fit")
    for name, (make, part) in PEERS.items():
        try:
            own = Reading(reading.batch_size, reading.sequence_length, max(reading.batches // part, 1))
            yield make(corpus, own)
        except PeerMissing as error:
            yield Measurement(name, missing=str(error))
    yield readers.bare_memory_map(corpus, reading)


def _encoders(directory: Path, text_bytes: int) -> Iterator[Contestant]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    documents: list[bytes] = []
    size = 0
    for document in open_source(StandardLibrarySource(type="standard_library")).documents():
        documents.append(document.content)
        size += len(document.content)
        if size >= text_bytes:
            break
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [document.decode(errors="replace") for document in documents]
    library.train_from_iterator(texts, trainer)
    library.save(str(directory / "tokenizer.json"))
    ours = open_tokenizer(HuggingFaceTokenizer(type="huggingface", path=str(directory)))
    alone = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for name, encode in (
        ("our tokenizer, bytes to arrays of ids", lambda: ours.encode_many(documents)),
        ("tokenizers' encode_batch_fast alone", lambda: alone.encode_batch_fast(texts)),
    ):
        yield Contestant(name, encode, prepare=lambda: None, tokens=size)


def _measure(contestants: Sequence[Contestant | Measurement], rounds: int, say: Say) -> tuple[Measurement, ...]:
    """Times each contestant once a round, after one to warm up; a measurement stays as it is."""
    running = [contestant for contestant in contestants if isinstance(contestant, Contestant)]
    times: dict[str, list[tuple[float, float]]] = {contestant.name: [] for contestant in running}
    for index in range(rounds + 1):
        for contestant in running:
            times[contestant.name].append(time_once(contestant))
        say("warmed up" if index == 0 else f"round {index} of {rounds}")
    return tuple(
        Measurement(row.name, row.tokens, 0, *zip(*times[row.name][1:], strict=True))
        if isinstance(row, Contestant)
        else row
        for row in contestants
    )


def _spread(values: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} .. {high})"


def tables(result: DataBenchmark) -> tuple[Table, Table]:
    """Readers and tokenizers, medians with the least and the most over the rounds."""
    reading = result.reading
    read = Table(
        title=f"Batches of {reading.batch_size} x {reading.sequence_length} tokens from {result.corpus.tokens:,} tokens"
        f" in {result.corpus.documents:,} documents, no workers",
        caption="median (least .. most) over rounds",
    )
    for heading in ("", "million tokens/s", "ours / this"):
        read.add_column(heading, justify="right" if heading else "left")
    for row in result.rows:
        if row.missing:
            read.add_row(row.name, escape(row.missing))
        else:
            read.add_row(
                row.name,
                _spread([rate / 1e6 for rate in row.tokens_per_second()], 1),
                _spread(result.ratios(row), 2),
            )
    encoded = Table(title="Text to ids, one process", caption="median (least .. most) over rounds")
    for heading in ("", "MB/s"):
        encoded.add_column(heading, justify="right" if heading else "left")
    for row in result.encoding:
        encoded.add_row(row.name, _spread([rate / 1e6 for rate in row.tokens_per_second()], 2))
    return read, encoded


def print_bench_data(tokens: int, rounds: int, as_json: bool = False) -> None:
    """Measures at the standard sizes and prints the tables, or JSON with every round."""
    console = Console()
    say: Say = (lambda text: None) if as_json else console.print
    result = bench_data(tokens, Reading(), 8_000_000, rounds, say)
    if as_json:
        console.print_json(data=result.to_dict())
        return
    about = machine()
    console.print(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}")
    for drawn in tables(result):
        console.print(drawn)
    console.print(
        f"From nothing to the first batch: {result.first_start:.2f} s, and {result.later_start:.2f} s the next time."
    )
