"""Opens the data of a run: tokenizer, training samples, held-out samples and what they amount to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from data.config import DataConfig
from data.documents import SplitCounts
from data.errors import DataError
from data.packing import PackedSamples
from data.prepare import prepare
from data.tokenizers import Tokenizer, open_tokenizer


@dataclass(frozen=True)
class SplitSummary:
    """One split in numbers: what it holds, and how many samples that makes."""

    counts: SplitCounts
    samples_per_epoch: int
    dropped_tokens: int  # behind the last full sample of an epoch


@dataclass(frozen=True)
class DataSummary:
    """Both splits in numbers."""

    train: SplitSummary
    held_out: SplitSummary

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries, for logs and JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Data:
    """The data of a run.

    ``fingerprint`` is a hash of everything that decides what sample i is: the token ids of both splits, the
    boundary mark, the sequence length and the seed. Two runs with equal fingerprints read equal samples,
    wherever their files lie; a run that resumes under another fingerprint would not continue its data.
    """

    train: PackedSamples
    held_out: PackedSamples
    tokenizer: Tokenizer
    summary: DataSummary
    fingerprint: str


def open_data(config: DataConfig, seed: int) -> Data:
    """Reads, tokenizes (or opens from the cache) and packs what ``config`` describes.

    ``seed`` (>= 0) decides the order of training samples. Raises ``DataError`` for anything missing, empty,
    unreadable or unfit.
    """
    if seed < 0:
        raise DataError(f"the seed of the data order is {seed}; give 0 or more.")
    tokenizer = open_tokenizer(config.tokenizer)
    documents = prepare(config, tokenizer)
    lengths = tokenizer.token_byte_lengths()
    train, held_out = (
        PackedSamples(
            documents[split],
            sequence_length=config.sequence_length,
            boundary_id=tokenizer.boundary_id,
            token_byte_lengths=lengths,
            seed=seed,
            shuffled=split == "train",
        )
        for split in ("train", "held_out")
    )
    summary = DataSummary(
        *(
            SplitSummary(samples.documents.counts, samples.samples_per_epoch, samples.dropped_tokens)
            for samples in (train, held_out)
        )
    )
    content = [
        summary.train.counts.sha256,
        summary.held_out.counts.sha256,
        tokenizer.boundary_id,
        config.sequence_length,
        seed,
    ]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Data(train, held_out, tokenizer, summary, fingerprint)
