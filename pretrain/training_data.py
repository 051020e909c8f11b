"""What a run reads: its samples in order, this rank's share of each batch, and what a checkpoint says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from data.batch import Batch
from data.dataset import Data, SplitSummary, open_data
from data.mixture import Phase
from data.order import merged, rank_share, sample_indices
from data.read_ahead import ReadAhead
from data.samples import MixtureSamples
from pretrain.checkpoint.rollback import left_out_of
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.parallel.topology import Topology


class TrainingData:
    """The data of one run on this rank; positions are samples of the whole run, those left out among them.

    Attributes:
        opened: both splits, and the tokenizer.
        left_out: half-open ranges of samples that rollbacks have taken out of the order.
    """

    def __init__(self, config: Config):
        """Opens the data; preparing it may take long.

        Raises:
            InputError, DataError: it cannot be read, or the model's vocabulary is too small for it.
        """
        train = config.train
        self.config = config
        self.opened: Data = open_data(config.data, train.seed, train.global_batch_size if train.carry_state else None)
        needed, given = self.opened.tokenizer.vocab_size, config.model.vocab_size
        if needed > given:
            raise InputError(
                f"model.vocab_size={given} is smaller than the vocabulary of data.tokenizer, which has "
                f"{needed} ids; set model.vocab_size to at least {-(-needed // 8) * 8}"
            )
        self.left_out: list[tuple[int, int]] = []
        self._reader: ReadAhead[list[Batch]] = ReadAhead(self._read)
        self._topology: Topology | None = None

    def share_among(self, topology: Topology) -> None:
        """Has batches be those of this rank; to be called once, before the first is read."""
        self._topology = topology

    def go_on(self, state: Mapping[str, Any], position: int) -> None:
        """Goes on where a checkpoint was written.

        Args:
            state: what it holds, :meth:`state` of then among it.
            position: samples that it has seen.
        """
        self.left_out = merged([*self.left_out, *left_out_of(state)])
        if isinstance(self.opened.train, MixtureSamples):
            self.opened.train.go_on([Phase(**phase) for phase in state["mixture_phases"]], position)
        self.opened.go_on(state.get("bookmarks", {}))

    def state(self, position: int) -> dict[str, object]:
        """What a later start needs to go on from ``position``."""
        state: dict[str, object] = {
            "data_fingerprint": self.opened.fingerprint,
            "bookmarks": self.opened.bookmarks(position),
            **({"left_out_samples": self.left_out} if self.left_out else {}),
        }
        if isinstance(self.opened.train, MixtureSamples):
            state["source_fingerprints"] = self.opened.source_fingerprints
            state["mixture_phases"] = [asdict(phase) for phase in self.opened.train.order.phases]
        return state

    def take(self, position: int, is_last: bool) -> list[Batch]:
        """This rank's micro-batches of the batch at ``position``; the one behind it is read meanwhile, if any.

        Raises:
            DataError: it cannot be read.
        """
        return self._reader.take(position, None if is_last else self.behind(position))

    def behind(self, position: int) -> int:
        """The position once the batch at ``position`` is read."""
        return sample_indices(position, self.config.train.global_batch_size, self.left_out)[-1] + 1

    def _read(self, first: int) -> list[Batch]:
        train, topology = self.config.train, self._topology
        indices = sample_indices(first, train.global_batch_size, self.left_out)
        shares = rank_share(indices, train.micro_batch_size, topology.data_rank, topology.data_size)
        length = self.config.data.length_at(first * self.config.data.sequence_length)
        return [self.opened.train.batch(share).cut(length) for share in shares]

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source of a mixture was read through up to a position; nothing of a single source."""
        return self.opened.train.epochs(position) if isinstance(self.opened.train, MixtureSamples) else {}

    def description(self) -> list[str]:
        """What there is and how the run goes through it, in lines."""
        train, summary = self.config.train, self.opened.summary
        lines = [f"{_described(summary.train)}, {summary.held_out.counts.tokens:,} held out"]
        if isinstance(self.opened.train, MixtureSamples):
            lines.append(f"mixture: {self._epochs_of_sources(self.opened.train)}")
        if train.carry_state:
            rows = train.global_batch_size
            each = summary.train.samples_per_epoch // rows
            lines.append(f"each of {rows} rows goes on from step to step, through {each:,} samples an epoch")
        return lines

    def _epochs_of_sources(self, mixture: MixtureSamples) -> str:
        """For each source of the mixture, how often it will have been read through at the end of the run."""
        consumed = mixture.order.consumed(self.config.train.steps * self.config.train.global_batch_size)
        parts = []
        for name, samples in mixture.sources.items():
            if samples.samples_per_epoch is None:
                parts.append(f"{name} {consumed.get(name, 0):,} samples, streamed")
            else:
                parts.append(f"{name} {samples.epochs(consumed.get(name, 0)):.2f} epochs")
        return ", ".join(parts) + " by the end of the run"

    def close(self) -> None:
        """Ends what reads in the background."""
        self._reader.close()
        self.opened.close()


def _described(split: SplitSummary) -> str:
    if split.counts is None:
        return "training tokens are streamed"
    return f"{split.counts.tokens:,} training tokens in {split.counts.documents:,} documents"
