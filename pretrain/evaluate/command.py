"""``pretrain evaluate``: a checkpoint's held-out loss, beside a bigram model's on the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.baseline import LARGEST_VOCABULARY, bigram_bits_per_byte
from data.dataset import open_data
from data.samples import ConcatenatedSamples
from pretrain.evaluate.by_position import LossAtLength, check_lengths, evaluate_by_position
from pretrain.evaluate.held_out import evaluate_held_out, held_out_indices
from pretrain.evaluate.position_report import draw_positions, position_text
from pretrain.models.loading import load_decoder
from pretrain.observe.picture import check_suffix
from pretrain.parallel.schedule import BatchLoss


@dataclass(frozen=True)
class SourceLoss:
    """Held-out figures of one source of a mixture; None where no sample came from it."""

    labels: int
    nats_per_token: float | None
    bits_per_byte: float | None

    @classmethod
    def of(cls, loss: BatchLoss | None) -> SourceLoss:
        return cls(0, None, None) if loss is None else cls(loss.labels, loss.nats_per_token, loss.bits_per_byte)


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures of one checkpoint; ``bigram_bits_per_byte`` is None for large vocabularies.

    Attributes:
        sources: of each source of a mixture, by name.
        by_position: for each length of rows, where it was asked for.
        notes: what a reader of ``by_position`` should know, a sentence each.
    """

    checkpoint: str
    step: int
    labels: int
    nats_per_token: float
    bits_per_byte: float
    bigram_bits_per_byte: float | None
    sources: dict[str, SourceLoss]
    by_position: list[LossAtLength]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """Some lines for a person."""
        lines = [
            f"{self.checkpoint} (step {self.step})",
            f"held out: {self.labels:,} labels, {self.nats_per_token:.4f} nats per token",
            f"  this model    {self.bits_per_byte:.3f} bits per byte",
        ]
        if self.bigram_bits_per_byte is not None:
            lines.append(f"  bigram model  {self.bigram_bits_per_byte:.3f} bits per byte, on the same bytes")
        width = max([len(name) for name in self.sources], default=0)
        for name, loss in self.sources.items():
            if loss.nats_per_token is None:
                lines.append(f"  {name:{width}}  no sample: ask for more with --samples")
                continue
            lines.append(
                f"  {name:{width}}  {loss.nats_per_token:.4f} nats per token, {loss.bits_per_byte:.3f} bits per byte, "
                f"{loss.labels:,} labels"
            )
        if self.by_position:
            lines += position_text(self.by_position)
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def evaluate_checkpoint(
    source: Path,
    samples: int,
    lengths: Sequence[int] | None = None,
    picture: Path | None = None,
) -> Evaluation:
    """Evaluates the model in one process on the data that its own configuration names.

    Args:
        source: a run or checkpoint.
        samples: held-out samples, at most.
        lengths: of rows, by whose positions the loss is wanted too, on about as many tokens; an empty list means
            the training length.
        picture: where the loss by position is drawn.

    Raises:
        InputError, DataError: the checkpoint or its data is missing or does not fit.
    """
    if picture is not None:
        check_suffix(picture)
    loaded = load_decoder(source, "auto")
    trained = loaded.config.data.sequence_length
    wanted = None if lengths is None else list(lengths) or [trained]
    notes = check_lengths(loaded.config, wanted) if wanted else []
    data = open_data(loaded.config.data, loaded.config.train.seed)
    loss = evaluate_held_out(
        loaded.decoder,
        loaded.decoder,
        data.held_out,
        samples,
        loaded.config.train.micro_batch_size,
        loaded.topology,
    )
    bigram = None
    if data.tokenizer.vocab_size <= LARGEST_VOCABULARY:
        indices = held_out_indices(data.held_out, samples)
        bigram = bigram_bits_per_byte(data.train, data.held_out, held_out_indices=indices)
    names = list(data.held_out.sources) if isinstance(data.held_out, ConcatenatedSamples) else []
    tokens = min(samples, data.held_out.samples_per_epoch) * trained
    positions = evaluate_by_position(loaded, data.held_out, wanted, tokens) if wanted else []
    if picture is not None and positions:
        draw_positions(positions, trained, f"{loaded.checkpoint} (step {loaded.step})", picture)
    return Evaluation(
        str(loaded.checkpoint),
        loaded.step,
        loss.whole.labels,
        loss.whole.nats_per_token,
        loss.whole.bits_per_byte,
        bigram,
        {name: SourceLoss.of(loss.sources.get(name)) for name in names},
        positions,
        notes,
    )
