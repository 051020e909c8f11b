"""Whether an exported directory computes what our model computes."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.errors import CheckError
from pretrain.models.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Package of code that transformers copied from a model's directory.
_CODE_CACHE = "transformers_modules."

# Both sides compute in float32 and differ only in the order of sums.
LOGIT_TOLERANCE = 1e-4
# One token, around one chunk, and several chunks with a rest.
COMPARED_LENGTHS = (1, 63, 64, 65, 200)

# Some models amplify rounding (the per-head norm divides by the spread of a cell output that may nearly cancel).
# A comparison that fails says how far the model's own logits move when its embeddings change in their last bit.
_LAST_BIT = 2.0**-23
_PERTURBATIONS = 4


@dataclass(frozen=True)
class Comparison:
    """Logits of two models on the same random tokens.

    Attributes:
        largest_difference: absolute; NaN where either side has one.
        tolerance: the largest that is accepted.
        lengths: of the sequences.
        noise: how far rounding alone moves our logits; measured only where they disagree.
    """

    largest_difference: float
    tolerance: float
    lengths: tuple[int, ...]
    noise: float | None = None

    @property
    def agrees(self) -> bool:
        return self.largest_difference <= self.tolerance


@torch.no_grad()
def compare_with_transformers(
    decoder: Decoder, vocab_size: int, directory: Path, tolerance: float = LOGIT_TOLERANCE
) -> Comparison:
    """Loads the directory as a user would, and compares logits with ours, in float32 on the CPU.

    Args:
        decoder: our model, whole and on the CPU.
        vocab_size: tokens are drawn below it.
        directory: the exported files.
        tolerance: largest absolute difference of a logit that is accepted.

    Raises:
        CheckError: the class did not take every tensor as it was written, or lacks one.
    """
    from transformers import AutoModelForCausalLM

    with _without_progress_bars():
        exported, loading = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            # Written just now, by this package.
            trust_remote_code=True,
        )
    _forget_code(exported)
    problems = {kind: names for kind, names in loading.items() if names}
    if problems:
        raise CheckError(f"transformers did not load every tensor as it was written: {problems}")
    exported.eval()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(vocab_size, (2, length), generator=generator) for length in COMPARED_LENGTHS]
    ours = [decoder.logits(tokens)[0] for tokens in batches]
    theirs = [exported(input_ids=tokens).logits for tokens in batches]
    largest = _largest_difference(ours, theirs)
    noise = None if largest <= tolerance else _rounding_noise(decoder, batches, ours)
    return Comparison(largest, tolerance, COMPARED_LENGTHS, noise)


def _forget_code(model: PreTrainedModel) -> None:
    """Removes the copy of a model's code that ``transformers`` keeps in the user's cache; the model goes on working.

    The directory that it was loaded from is about to be renamed, so nothing would find it there again.
    """
    module = type(model).__module__
    if module.startswith(_CODE_CACHE):
        # Below the model's name are versions, which configuration and model need not share.
        package = module.rsplit(".", 2)[0]
        shutil.rmtree(Path(sys.modules[module].__file__ or "").parents[1], ignore_errors=True)
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]


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
