"""``pretrain evaluate``: a checkpoint's held-out loss, beside a bigram model's on the same bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from data.baseline import LARGEST_VOCABULARY, bigram_bits_per_byte
from data.dataset import open_data
from pretrain.evaluate.held_out import evaluate_held_out, held_out_indices
from pretrain.models.loading import load_decoder


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures of one checkpoint; ``bigram_bits_per_byte`` is None for large vocabularies."""

    checkpoint: str
    step: int
    labels: int
    nats_per_token: float
    bits_per_byte: float
    bigram_bits_per_byte: float | None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def to_text(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{self.checkpoint} (step {self.step})",
            f"held out: {self.labels:,} labels, {self.nats_per_token:.4f} nats per token",
            f"  this model    {self.bits_per_byte:.3f} bits per byte",
        ]
        if self.bigram_bits_per_byte is not None:
            lines.append(f"  bigram model  {self.bigram_bits_per_byte:.3f} bits per byte, on the same bytes")
        return "\n".join(lines)


def evaluate_checkpoint(source: Path, samples: int) -> Evaluation:
    """Evaluates the model in one process on the data that its own configuration names.

    Raises:
        InputError, DataError: the checkpoint or its data is missing or does not fit.
    """
    loaded = load_decoder(source, "auto")
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
    return Evaluation(str(loaded.checkpoint), loaded.step, loss.labels, loss.nats_per_token, loss.bits_per_byte, bigram)
