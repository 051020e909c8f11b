"""How much each attention layer of a model matters: what is lost on held-out text where it alone is left out.

Leave-one-out ranking, by which Apriel-H1 (Ostapenko et al. 2025) chose the first layers to replace: the mixer of one
layer at a time gives nothing, its block so being its channel mixer alone. Layers are ordered by the divergence of the
next tokens' probabilities from those of the whole model, least first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.dataset import open_data
from pretrain.distill.divergence import divergence
from pretrain.errors import InputError
from pretrain.evaluate.held_out import held_out_indices
from pretrain.models.attention.config import AttentionConfig
from pretrain.models.decoder import IGNORED_LABEL, Block, Decoder
from pretrain.models.loading import load_decoder
from pretrain.models.mixer import Documents, State


@dataclass(frozen=True)
class LayerImportance:
    """What the model loses without one layer's attention.

    Attributes:
        layer: counted from 0.
        divergence: KL(whole || without), nats per token.
        loss_rise: of the held-out cross-entropy, nats per token.
    """

    layer: int
    divergence: float
    loss_rise: float


@dataclass(frozen=True)
class LayerRanking:
    """The attention layers of a checkpoint, the least important first."""

    checkpoint: str
    step: int
    labels: int
    nats_per_token: float
    layers: tuple[LayerImportance, ...]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def to_text(self) -> str:
        """A table for a person."""
        lines = [
            f"{self.checkpoint} (step {self.step})",
            f"held out: {self.labels:,} labels, {self.nats_per_token:.4f} nats per token",
            "without the attention of one layer, the least important first, in nats per token:",
            f"{'layer':>7} {'divergence':>11} {'loss rise':>10}",
        ]
        lines += [f"{row.layer:>7} {row.divergence:>11.5f} {row.loss_rise:>+10.5f}" for row in self.layers]
        return "\n".join(lines)


class _Nothing(nn.Module):
    """In the place of a mixer: adds nothing to the residual stream."""

    def forward(self, hidden: Tensor, state: State | None, documents: Documents | None) -> tuple[Tensor, State | None]:
        return torch.zeros_like(hidden), state


@contextlib.contextmanager
def _without_mixer(block: Block) -> Iterator[None]:
    mixer = block.mixer
    block.mixer = _Nothing()
    try:
        yield
    finally:
        block.mixer = mixer


@torch.no_grad()
def rank_layers(source: Path, samples: int) -> LayerRanking:
    """Ranks the attention layers of a checkpoint on its own held-out data, in one process.

    Each batch is read once with the whole model and once without each layer.

    Args:
        source: a run or a checkpoint.
        samples: held-out samples, at most.

    Raises:
        InputError, DataError: the checkpoint or its data is missing or does not fit, or there is no attention.
    """
    loaded = load_decoder(source, "auto")
    decoder, train = loaded.decoder, loaded.config.train
    model = loaded.config.model
    layers = [layer for layer in range(model.num_layers) if isinstance(model.block(layer).mixer, AttentionConfig)]
    if model.hierarchy is not None or not layers:
        why = "is a hierarchy" if model.hierarchy is not None else "has no attention layers"
        raise InputError(f"{loaded.checkpoint}: {why}, so there is nothing to rank; give a decoder with attention")
    data = open_data(loaded.config.data, train.seed)
    indices = held_out_indices(data.held_out, samples)
    # Loss of the whole model and labels; then divergence and loss without each layer.
    whole_totals = torch.zeros(2, dtype=torch.float64)
    totals = torch.zeros(len(layers), 2, dtype=torch.float64)
    for first in range(0, len(indices), train.micro_batch_size):
        batch = data.held_out.batch(indices[first : first + train.micro_batch_size]).to(loaded.topology.device)
        labels = batch.labels.t()
        whole = _logits(decoder, batch.tokens, batch.document_starts)
        whole_totals += torch.tensor([_loss(whole, labels), (labels != IGNORED_LABEL).sum().item()])
        for row, layer in enumerate(layers):
            with _without_mixer(decoder.layers[str(layer)]):
                without = _logits(decoder, batch.tokens, batch.document_starts)
            lost = (divergence(without, whole) * (labels != IGNORED_LABEL)).double().sum().item()
            totals[row] += torch.tensor([lost, _loss(without, labels)])
    nats, count = whole_totals.tolist()
    found = [
        LayerImportance(layer, lost / count, (loss - nats) / count)
        for layer, (lost, loss) in zip(layers, totals.tolist(), strict=True)
    ]
    found.sort(key=lambda row: row.divergence)
    return LayerRanking(str(loaded.checkpoint), loaded.step, int(count), nats / count, tuple(found))


def _logits(decoder: Decoder, tokens: Tensor, document_starts: Tensor) -> Tensor:
    """``(sequence, batch, vocabulary)``."""
    return decoder.logits(tokens, document_starts=document_starts)[0].transpose(0, 1)


def _loss(logits: Tensor, labels: Tensor) -> float:
    """Summed cross-entropy of the labels that count."""
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return total.double().sum().item()
