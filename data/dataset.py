"""Opens the data of a run: tokenizer, training samples, held-out samples and what they amount to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from data.config import DataConfig
from data.documents import SplitCounts
from data.errors import DataError
from data.mixture import Phase
from data.packing import PackedSamples
from data.prepare import prepare
from data.samples import ConcatenatedSamples, MixtureSamples, Samples
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

    ``fingerprint`` is a hash of everything that decides what sample i is: the boundary mark, the sequence length,
    the seed, and the documents of both splits. Two runs with equal fingerprints read equal samples, wherever their
    files lie; a run that resumes under another would not continue its data. The sources of a mixture may change
    during a run, so their documents are hashed apart, by name, in ``source_fingerprints``.
    """

    train: Samples
    held_out: Samples
    tokenizer: Tokenizer
    summaries: dict[str, DataSummary]
    fingerprint: str
    source_fingerprints: dict[str, str]

    @property
    def summary(self) -> DataSummary:
        """All sources together."""
        summaries = list(self.summaries.values())
        return DataSummary(
            _together([summary.train for summary in summaries]), _together([summary.held_out for summary in summaries])
        )


ONLY_SOURCE = "source"


def open_data(config: DataConfig, seed: int) -> Data:
    """Reads, tokenizes (or opens from the cache) and packs what ``config`` describes.

    ``seed`` (>= 0) decides the order of training samples. Raises ``DataError`` for anything missing, empty,
    unreadable or unfit; of a mixture it names the source.
    """
    if seed < 0:
        raise DataError(f"the seed of the data order is {seed}; give 0 or more.")
    tokenizer = open_tokenizer(config.tokenizer)
    lengths = tokenizer.token_byte_lengths()
    splits: dict[str, dict[str, PackedSamples]] = {"train": {}, "held_out": {}}
    if config.mixture is None:
        sources = {ONLY_SOURCE: config}
    else:
        sources = {
            name: config.model_copy(update={"source": entry.source, "mixture": None, "curriculum": []})
            for name, entry in config.mixture.items()
        }
    for name, single in sources.items():
        try:
            documents = prepare(single, tokenizer)
            for split, samples in splits.items():
                samples[name] = PackedSamples(
                    documents[split],
                    sequence_length=config.sequence_length,
                    boundary_id=tokenizer.boundary_id,
                    token_byte_lengths=lengths,
                    # Sources of one size would else be read in one order.
                    seed=seed if config.mixture is None else seed_of_source(seed, name),
                    shuffled=split == "train",
                )
        except DataError as error:
            raise DataError(f"data.mixture.{name}: {error}" if config.mixture else str(error)) from error
    train, held_out = splits["train"], splits["held_out"]
    summaries = {name: DataSummary(_summary(train[name]), _summary(held_out[name])) for name in sources}
    content = {name: [both.train.counts.sha256, both.held_out.counts.sha256] for name, both in summaries.items()}
    common = [tokenizer.boundary_id, config.sequence_length, seed]
    return Data(
        train=train[ONLY_SOURCE] if config.mixture is None else MixtureSamples(train, _phases(config), seed),
        held_out=held_out[ONLY_SOURCE] if config.mixture is None else ConcatenatedSamples(held_out),
        tokenizer=tokenizer,
        summaries=summaries,
        fingerprint=_hash([*(["mixture"] if config.mixture else content[ONLY_SOURCE]), *common]),
        source_fingerprints={name: _hash(hashes) for name, hashes in content.items()} if config.mixture else {},
    )


def seed_of_source(seed: int, name: str) -> int:
    """The seed of one source of a mixture; it does not depend on which others there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def _phases(config: DataConfig) -> list[Phase]:
    """The weights of the mixture by samples: a phase starts with the first sample behind its ``from_tokens``."""
    phases = [Phase(0, {name: entry.weight for name, entry in config.mixture.items()})]
    for later in config.curriculum:
        first = -(-later.from_tokens // config.sequence_length)
        if first == phases[-1].first:
            raise DataError(
                f"data.curriculum changes the weights twice within one sample of {config.sequence_length} tokens, at"
                f" from_tokens={later.from_tokens}; merge the two."
            )
        phases.append(Phase(first, dict(later.weights)))
    return phases


def _hash(content: list[object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _together(parts: list[SplitSummary]) -> SplitSummary:
    counts = [part.counts for part in parts]
    if len(counts) == 1:
        return parts[0]
    known = [count.bytes for count in counts if count.bytes is not None]
    return SplitSummary(
        SplitCounts(
            documents=sum(count.documents for count in counts),
            tokens=sum(count.tokens for count in counts),
            bytes=sum(known) if len(known) == len(counts) else None,
            empty_documents=sum(count.empty_documents for count in counts),
            invalid_utf8_documents=sum(count.invalid_utf8_documents for count in counts),
            sha256=_hash([count.sha256 for count in counts]),
        ),
        samples_per_epoch=sum(part.samples_per_epoch for part in parts),
        dropped_tokens=sum(part.dropped_tokens for part in parts),
    )


def _summary(samples: PackedSamples) -> SplitSummary:
    return SplitSummary(samples.documents.counts, samples.samples_per_epoch, samples.dropped_tokens)
