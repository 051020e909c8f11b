"""Loss by position in the document, and on rows longer than those that the model was trained on.

A row that begins within a document counts from its own beginning, where the state begins too. Long rows are read in
segments that hand on their states, so that memory grows with the length only where a mixer's state does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import IGNORED_LABEL, Batch
from data.errors import DataError
from data.samples import HeldOutSamples
from pretrain.config import Config
from pretrain.config.carried_states import bytes_after_any_length
from pretrain.errors import InputError
from pretrain.evaluate.held_out import held_out_indices
from pretrain.models.decoder import Decoder
from pretrain.models.loading import LoadedModel
from pretrain.models.mixer import State
from pretrain.models.registry import family_of

# Logits are made for a whole segment; this bounds their memory for long rows.
SEGMENT = 1024
# States that grow with what is read may take so much of one row.
_LARGEST_STATE = 2 << 30


@dataclass(frozen=True)
class Bucket:
    """Labels at some positions.

    Attributes:
        first, last: positions, from 0: so many tokens of the document stand before the one that predicts the label.
        labels: how many.
        nats_per_token: their mean loss.
    """

    first: int
    last: int
    labels: int
    nats_per_token: float


@dataclass(frozen=True)
class BeyondTraining:
    """Labels with more before them than the model was trained with.

    Attributes:
        labels: how many.
        nats_per_token: with all that is before them.
        in_training_rows: the same labels, read in rows of the training length that each begin anew.
    """

    labels: int
    nats_per_token: float
    in_training_rows: float


@dataclass(frozen=True)
class LossAtLength:
    """Loss on rows of one length.

    Attributes:
        length: tokens of a row.
        labels, nats_per_token: over all positions.
        buckets: positions 0, 1, 2 to 3, 4 to 7, ...; those without labels are left out.
        beyond: None where the rows are no multiple of the training length, or no document reaches so far.
    """

    length: int
    labels: int
    nats_per_token: float
    buckets: list[Bucket]
    beyond: BeyondTraining | None


def parse_lengths(text: str) -> list[int]:
    """``512,2048`` as numbers, each once, ascending.

    Raises:
        InputError: what is between the commas is no length.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) >= 2 for part in parts):
        raise InputError(f"--lengths {text}: expected numbers of tokens of 2 or more, for instance 512,2048,8192")
    return sorted({int(part) for part in parts})


def what_grows(config: Config) -> list[str]:
    """Names of blocks of the layers whose state grows with what is read."""
    model = config.model
    blocks = [block for block in dict.fromkeys(model.layers) if model.blocks[block].mixer is not None]
    return [
        name
        for name in blocks
        if bytes_after_any_length(model.blocks[name].mixer, model.hidden_size, model.num_layers) is None
    ]


def check_lengths(config: Config, lengths: Sequence[int]) -> list[str]:
    """What a reader of the figures should know, a sentence each.

    Raises:
        InputError: the model cannot read rows of these lengths in segments, or their states would be too large.
    """
    longest, trained = max(lengths), config.data.sequence_length
    if longest > trained and config.model.reads_word_starts:
        raise InputError(
            f"--lengths {longest}: model.hierarchy.type={config.model.hierarchy.type} reads words, which may reach "
            f"over the end of a segment; give lengths of at most data.sequence_length={trained}"
        )
    grows = what_grows(config)
    if longest <= trained or not grows:
        return []
    model = config.model
    layers = [model.blocks[name].mixer for name in (model.layers * model.num_layers)[: model.num_layers]]
    size = sum(
        family_of(mixer).cost(mixer, model.hidden_size, longest, 4, model.num_layers).state_bytes
        for mixer in layers
        if mixer is not None
    )
    names = ", ".join(f"model.blocks.{name}" for name in grows)
    if size > _LARGEST_STATE:
        raise InputError(
            f"--lengths {longest}: the state of {names} grows with every token and would take {size / 2**30:.1f} GiB a "
            f"row, more than {_LARGEST_STATE >> 30}; give shorter lengths, or a model with a window there"
        )
    return [
        f"{names} looks back without a window: memory grows to {size / 2**20:.1f} MiB of state a row of {longest}, and "
        f"positions from {trained} on were never trained"
    ]


@torch.no_grad()
def evaluate_by_position(
    loaded: LoadedModel, samples: HeldOutSamples, lengths: Sequence[int], tokens: int
) -> list[LossAtLength]:
    """The loss on rows of each length, from about ``tokens`` held-out tokens spread over the split.

    Raises:
        InputError: see :func:`check_lengths`; or there is not one row of held-out text that is so long.
    """
    check_lengths(loaded.config, lengths)
    found = []
    for length in lengths:
        try:
            rows = samples.with_length(length)
        except DataError as error:
            raise InputError(f"--lengths {length}: {error}") from error
        found.append(_at_length(loaded, rows, length, max(1, tokens // length)))
    return found


def _at_length(loaded: LoadedModel, samples: HeldOutSamples, length: int, count: int) -> LossAtLength:
    config, decoder = loaded.config, loaded.decoder
    trained, device = config.data.sequence_length, loaded.topology.device
    compares = length > trained and length % trained == 0
    together = max(1, config.train.micro_batch_size * trained // length)
    # Bucket 0 is position 0, bucket n positions 2^(n-1) to 2^n - 1.
    nats, labels = (torch.zeros(length.bit_length() + 1, dtype=torch.float64) for _ in range(2))
    beyond = torch.zeros(3, dtype=torch.float64)
    indices = held_out_indices(samples, count)
    for first in range(0, len(indices), together):
        batch = samples.batch(indices[first : first + together])
        counts, positions = batch.labels != IGNORED_LABEL, batch.positions
        losses = label_losses(decoder, batch.to(device)).cpu()
        # Of frexp the exponent of n >= 1 is 1 + floor(log2 n), and 0 of 0.
        bucket = torch.frexp(positions[counts].double())[1].long()
        nats.index_add_(0, bucket, losses[counts])
        labels.index_add_(0, bucket, torch.ones_like(losses[counts]))
        after = counts & (positions >= trained)
        if compares and after.any():
            anew = batch.cut(trained)
            parts = [label_losses(decoder, part.to(device)).cpu() for part in _row_by_row(anew, together)]
            again = torch.cat(parts).reshape(losses.shape)
            beyond += torch.stack([after.sum().double(), losses[after].sum(), again[after].sum()])
    buckets = [
        Bucket((1 << number) >> 1, (1 << number) - 1, int(many), float(total / many))
        for number, (total, many) in enumerate(zip(nats, labels, strict=True))
        if many
    ]
    many, read_on, anew = beyond.tolist()
    return LossAtLength(
        length,
        int(labels.sum()),
        float(nats.sum() / labels.sum().clamp(min=1)),
        buckets,
        BeyondTraining(int(many), read_on / many, anew / many) if many else None,
    )


def _row_by_row(batch: Batch, rows: int) -> list[Batch]:
    """The batch in parts of at most so many rows; what it counts is not kept."""
    parts = []
    for first in range(0, len(batch.tokens), rows):
        own = slice(first, first + rows)
        words = None if batch.word_starts is None else batch.word_starts[own]
        parts.append(Batch(batch.tokens[own], batch.labels[own], batch.document_starts[own], 0, 0, words))
    return parts


def label_losses(decoder: Decoder, batch: Batch) -> Tensor:
    """(B, S) float64 nats of each label, 0 where none counts; read in segments that hand on their states."""
    states: dict[str, State] | None = None
    losses = []
    segment = batch.tokens.shape[1] if batch.word_starts is not None else SEGMENT
    for first in range(0, batch.tokens.shape[1], segment):
        part = slice(first, first + segment)
        words = None if batch.word_starts is None else batch.word_starts[:, part]
        logits, states = decoder.logits(batch.tokens[:, part], states, batch.document_starts[:, part], words)
        losses.append(
            torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), batch.labels[:, part], ignore_index=IGNORED_LABEL, reduction="none"
            ).double()
        )
    return torch.cat(losses, dim=1)
