"""Whether an exported directory computes what our model computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrain.models.decoder import Decoder

# Both sides compute in float32 and differ only in the order of sums.
LOGIT_TOLERANCE = 1e-4
# One token, around one chunk, and several chunks with a rest.
COMPARED_LENGTHS = (1, 63, 64, 65, 200)

# Some models amplify rounding (the per-head norm divides by the spread of a cell output that may nearly cancel).
# There the tolerance follows the model's own noise: how far its logits move when its embeddings are changed in
# their last bit. Two correct models were seen up to 9 times that far apart; a wrong tensor moves logits by
# about their own size, far beyond the limit.
_LAST_BIT = 2.0**-23
_PERTURBATIONS = 4
_NOISE_FACTOR = 20.0
_TOLERANCE_LIMIT = 1e-2


@dataclass(frozen=True)
class Comparison:
    """Logits of two models on the same random tokens.

    Attributes:
        largest_difference: absolute; NaN where either side has one.
        tolerance: what rounding alone explains for this model.
        lengths: of the sequences.
    """

    largest_difference: float
    tolerance: float
    lengths: tuple[int, ...]

    @property
    def agrees(self) -> bool:
        return self.largest_difference <= self.tolerance


@torch.no_grad()
def compare_with_transformers(decoder: Decoder, vocab_size: int, directory: Path) -> Comparison:
    """Loads the directory as a user would, and compares logits with ours, in float32 on the CPU.

    Args:
        decoder: our model, whole and on the CPU.
        vocab_size: tokens are drawn below it.
        directory: the exported files.

    Raises:
        RuntimeError: the class did not take every tensor as it was written, or lacks one.
    """
    from transformers import AutoModelForCausalLM

    with _without_progress_bars():
        exported, loading = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    problems = {kind: names for kind, names in loading.items() if names}
    if problems:
        raise RuntimeError(f"transformers did not load every tensor as it was written: {problems}")
    exported.eval()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(vocab_size, (2, length), generator=generator) for length in COMPARED_LENGTHS]
    ours = [decoder.logits(tokens)[0] for tokens in batches]
    theirs = [exported(input_ids=tokens).logits for tokens in batches]
    largest = _largest_difference(ours, theirs)
    tolerance = LOGIT_TOLERANCE
    if largest > tolerance:
        noise = _NOISE_FACTOR * _rounding_noise(decoder, batches, ours)
        tolerance = min(max(tolerance, noise), _TOLERANCE_LIMIT)
    return Comparison(largest, tolerance, COMPARED_LENGTHS)


def _largest_difference(some: list[Tensor], others: list[Tensor]) -> float:
    # The maximum of tensors keeps a NaN; Python's may lose it.
    differences = [(one - other).abs().max() for one, other in zip(some, others, strict=True)]
    return torch.stack(differences).max().item()


def _rounding_noise(decoder: Decoder, batches: list[Tensor], logits: list[Tensor]) -> float:
    """How far logits move when every embedding changes by a random relative amount of about its last bit."""
    weight = decoder.embedding.weight
    original = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    try:
        for _ in range(_PERTURBATIONS):
            weight.copy_(original * (1 + _LAST_BIT * torch.randn(original.shape, generator=generator)))
            moved = [decoder.logits(tokens)[0] for tokens in batches]
            largest = max(largest, _largest_difference(moved, logits))
    finally:
        weight.copy_(original)
    return largest


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()
