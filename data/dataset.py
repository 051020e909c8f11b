"""Opens the data of a run: tokenizer, training samples, held-out samples and what they amount to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data.batch import SampleFormat
from data.best_fit import BestFitSamples
from data.blocks import BlockReader
from data.config import ONLY_SOURCE, READ_IN_PLACE, DataConfig
from data.documents import SplitCounts
from data.encoding import Encoder
from data.errors import DataError
from data.mixture import Phase
from data.packing import PackedSamples, SourceSamples
from data.prepare import prepare
from data.samples import ConcatenatedSamples, HeldOutSamples, MixtureSamples, Samples
from data.sources import open_source
from data.splitting import held_out
from data.stream import StreamedSamples, first_held_out
from data.tokenizers import Tokenizer, open_tokenizer


@dataclass(frozen=True)
class SplitSummary:
    """One split in numbers: what it holds, and how many samples that makes. None: a stream, which nobody counted."""

    counts: SplitCounts | None
    samples_per_epoch: int | None
    dropped_tokens: int  # behind the last full sample of an epoch
    padding_tokens: int  # places of an epoch's samples that hold nothing


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
    the seed, how many rows go on from batch to batch, and the documents of both splits. Two runs with equal
    fingerprints read equal samples, wherever their files lie; a run that resumes under another would not continue its
    data. The sources of a mixture may change during a run, so their documents are hashed apart, by name, in
    ``source_fingerprints``.
    """

    train: Samples
    held_out: HeldOutSamples
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

    def bookmarks(self, position: int) -> dict[str, dict[str, Any]]:
        """What helps another process to find sample ``position`` quickly, by source, as JSON holds it."""
        if isinstance(self.train, MixtureSamples):
            return self.train.bookmarks(position)
        bookmark = self.train.bookmark(position)
        return {} if bookmark is None else {ONLY_SOURCE: bookmark}

    def go_on(self, bookmarks: Mapping[str, dict[str, Any]]) -> None:
        """Takes bookmarks that another process made; before the first sample is read."""
        sources = self.train.sources if isinstance(self.train, MixtureSamples) else {ONLY_SOURCE: self.train}
        for name, bookmark in bookmarks.items():
            if name in sources:
                sources[name].go_on(bookmark)

    def close(self) -> None:
        """Ends what reads in the background."""
        self.train.close()


@dataclass(frozen=True)
class _OpenedSource:
    """One source: its samples, and what names their content."""

    train: SourceSamples
    held_out: PackedSamples
    summary: DataSummary
    content: list[str]


def open_data(config: DataConfig, seed: int, contiguous_rows: int | None = None) -> Data:
    """Reads, tokenizes (or opens from the cache) and packs what ``config`` describes, or gets ready to stream it.

    ``seed`` (>= 0) decides the order of training samples. ``contiguous_rows``: the training batches have so many rows,
    and each goes on where it ended in the batch before; None: samples are in random order. Raises ``DataError`` for
    anything missing, empty, unreadable or unfit; of a mixture it names the source.
    """
    if seed < 0:
        raise DataError(f"the seed of the data order is {seed}; give 0 or more.")
    if contiguous_rows is not None:
        reason = config.why_not_contiguous()
        if reason:
            raise DataError(reason)
    tokenizer = open_tokenizer(config.tokenizer)
    opened = {}
    for name, single in config.by_source().items():
        try:
            # Sources of one size would else be read in one order.
            own_seed = seed if config.mixture is None else seed_of_source(seed, name)
            opened[name] = _open_source(single, tokenizer, own_seed, contiguous_rows)
        except DataError as error:
            raise DataError(f"data.mixture.{name}: {error}" if config.mixture else str(error)) from error
    only = opened.get(ONLY_SOURCE) if config.mixture is None else None
    content = {name: source.content for name, source in opened.items()}
    common = [tokenizer.boundary_id, config.sequence_length, seed]
    if config.packing != "concatenate":
        common.append(config.packing)
    if contiguous_rows is not None:
        common.append(["contiguous_rows", contiguous_rows])
    held_out = {name: source.held_out for name, source in opened.items()}
    train = {name: source.train for name, source in opened.items()}
    return Data(
        train=only.train if only else MixtureSamples(train, _phases(config), seed),
        held_out=only.held_out if only else ConcatenatedSamples(held_out),
        tokenizer=tokenizer,
        summaries={name: source.summary for name, source in opened.items()},
        fingerprint=_hash([*(only.content if only else ["mixture"]), *common]),
        source_fingerprints={} if only else {name: _hash(hashes) for name, hashes in content.items()},
    )


def _open_source(
    config: DataConfig, tokenizer: Tokenizer, seed: int, contiguous_rows: int | None = None
) -> _OpenedSource:
    """The only source of ``config``."""
    format = SampleFormat.of(tokenizer, config.sequence_length, config.predict_document_ends)
    if config.stream is not None and not isinstance(config.source, READ_IN_PLACE):
        return _open_stream(config, tokenizer, format, seed)
    documents = prepare(config, tokenizer)
    train: PackedSamples | BestFitSamples
    if config.packing == "best_fit":
        train = BestFitSamples(documents["train"], format, seed)
    else:
        train = PackedSamples(documents["train"], format, seed, shuffled=True, contiguous_rows=contiguous_rows)
    # Evaluations read every token, one document behind the other, whatever the packing of the training split.
    held_out = PackedSamples(documents["held_out"], format, seed, shuffled=False)
    summary = DataSummary(_summary(train), _summary(held_out))
    return _OpenedSource(train, held_out, summary, [documents[s].counts.sha256 for s in ("train", "held_out")])


def _open_stream(config: DataConfig, tokenizer: Tokenizer, format: SampleFormat, seed: int) -> _OpenedSource:
    source, stream, fraction = open_source(config.source), config.stream, config.held_out_fraction
    reader = BlockReader(
        source=source,
        is_held_out=lambda identity: held_out(identity, fraction),
        encoder=Encoder(tokenizer, config.tokenizer, stream.workers),
        boundary_id=tokenizer.boundary_id,
        seed=seed,
        shuffle_documents=stream.shuffle_documents,
    )
    train = StreamedSamples(reader, format, config.packing, background=stream.workers > 0)
    evaluated = first_held_out(source, tokenizer, fraction, stream.held_out_samples * config.sequence_length + 1)
    samples = PackedSamples(evaluated, format, seed, shuffled=False)
    settings = [fraction, stream.shuffle_documents]
    content = [source.fingerprint(), tokenizer.fingerprint(), _hash(settings)]
    return _OpenedSource(train, samples, DataSummary(SplitSummary(None, None, 0, 0), _summary(samples)), content)


def seed_of_source(seed: int, name: str) -> int:
    """The seed of one source of a mixture; it does not depend on which others there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def _phases(config: DataConfig) -> list[Phase]:
    """The weights of the mixture by samples: a phase starts with the first sample behind its ``from_tokens``."""
    phases = [Phase(0, {name: entry.weight for name, entry in config.mixture.items()})]
    for later in config.curriculum:
        if later.weights is None:
            continue
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
    if len(parts) == 1:
        return parts[0]
    dropped, padding = (sum(getattr(part, name) for part in parts) for name in ("dropped_tokens", "padding_tokens"))
    counts = [part.counts for part in parts if part.counts is not None]
    if len(counts) < len(parts):
        return SplitSummary(None, None, dropped, padding)
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
        samples_per_epoch=sum(part.samples_per_epoch for part in parts if part.samples_per_epoch is not None),
        dropped_tokens=dropped,
        padding_tokens=padding,
    )


def _summary(samples: PackedSamples | BestFitSamples) -> SplitSummary:
    counts = samples.documents.counts
    return SplitSummary(counts, samples.samples_per_epoch, samples.dropped_tokens, samples.padding_tokens)
