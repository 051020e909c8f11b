"""Whether a Hugging Face directory, exported or imported, computes what our model computes."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.tokenizers import Tokenizer
from data.tokenizers.base import split_word_starts
from pretrain.errors import CheckError, InputError
from pretrain.models.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Package of code that transformers copied from a model's directory.
_CODE_CACHE = "transformers_modules."

# Both sides compute in float32 and differ only in the order of sums.
LOGIT_TOLERANCE = 1e-4
# Root mean square of the difference over that of the logits, where one side computes in float32 and the other in
# bfloat16, which keeps 8 binary digits: a wrong tensor makes it about 1.
BFLOAT16_TOLERANCE = 0.1
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
        in_bfloat16: root mean square of the difference over that of the logits, with the other model in bfloat16; None
            where it is loaded in float32.
    """

    largest_difference: float
    tolerance: float
    lengths: tuple[int, ...]
    noise: float | None = None
    in_bfloat16: float | None = None

    @property
    def agrees(self) -> bool:
        return self.largest_difference <= self.tolerance and (self.in_bfloat16 or 0.0) <= BFLOAT16_TOLERANCE


@torch.no_grad()
def compare_with_transformers(
    decoder: Decoder,
    tokenizer: Tokenizer,
    directory: Path,
    tolerance: float = LOGIT_TOLERANCE,
    dtype: torch.dtype = torch.float32,
) -> Comparison:
    """Loads the directory as a user would, and compares logits with ours, in float32 on the CPU.

    A model that is loaded in bfloat16 is compared twice: computing in float32, which finds whatever stands in a wrong
    place, and in bfloat16, as users will.

    Args:
        decoder: our model, whole and on the CPU, its weights rounded to what the files hold.
        tokenizer: the run's, of whose ids tokens are drawn. Where the model reads words, ours are the tokenizer's, and
            those of the exported model are its own.
        directory: the exported files.
        tolerance: largest absolute difference of a logit that is accepted, in float32.
        dtype: in which the exported model is to be loaded unless its user says otherwise.

    Raises:
        CheckError: the class did not take every tensor as it was written, or lacks one.
    """
    from transformers import AutoModelForCausalLM

    batches = _random_batches(tokenizer.vocab_size)
    if decoder.model.reads_word_starts:
        # Random bytes are hardly ever characters: in every second sequence they are all ASCII.
        for tokens in batches:
            tokens[1] %= 128
    words = [_word_starts(decoder, tokenizer, tokens) for tokens in batches]
    # Written just now, by this package.
    exported = _load(AutoModelForCausalLM, directory, trust_remote_code=True)
    _forget_code(exported)
    comparison = _compare(decoder, exported, batches, words, tolerance)
    if dtype == torch.float32 or not comparison.agrees:
        return comparison
    del exported
    exported = _load(AutoModelForCausalLM, directory, dtype="auto", trust_remote_code=True)
    _forget_code(exported)
    if exported.dtype != dtype:
        raise CheckError(f"transformers loads the exported model as {exported.dtype}, not as {dtype}")
    ours = [decoder.logits(tokens, word_starts=starts)[0] for tokens, starts in zip(batches, words, strict=True)]
    theirs = [exported(input_ids=tokens).logits.float() for tokens in batches]
    return dataclasses.replace(comparison, in_bfloat16=_relative_difference(ours, theirs))


@torch.no_grad()
def compare_with_class(
    decoder: Decoder, directory: Path, architecture: str, config: PreTrainedConfig, tolerance: float = LOGIT_TOLERANCE
) -> Comparison:
    """Loads a directory with a class of ``transformers`` itself, and compares logits with ours, in float32 on the CPU.

    Nothing of the directory is executed.

    Args:
        decoder: our model, whole and on the CPU.
        directory: the weights.
        architecture: name of the class.
        config: the class's configuration, instead of the directory's.
        tolerance: largest absolute difference of a logit that is accepted.

    Raises:
        InputError: a file that only ``transformers`` reads, such as ``generation_config.json``, is not what it expects.
        CheckError: the class did not take every tensor as it is, or lacks one.
    """
    import transformers

    try:
        there = _load(getattr(transformers, architecture), directory, config=config, use_safetensors=True)
    except CheckError:
        raise
    except Exception as error:  # the library raises whatever a value happens to cause
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{directory}: transformers does not load it as {architecture} ({reason}); mend what config.json, "
            f"generation_config.json or the index of the weights says, or leave the comparison out with --no-check"
        ) from error
    batches = _random_batches(decoder.model.vocab_size)
    return _compare(decoder, there, batches, [None] * len(batches), tolerance)


def _load(
    model_class: Any, directory: Path, dtype: torch.dtype | str = torch.float32, **options: Any
) -> PreTrainedModel:
    """A model in evaluation mode; raises ``CheckError`` unless the files hold just its tensors."""
    with _without_progress_bars():
        model, loading = model_class.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
    problems = {kind: names for kind, names in loading.items() if names}
    if problems:
        raise CheckError(f"transformers did not load every tensor as it was written: {problems}")
    return model.eval()


def _random_batches(num_ids: int) -> list[Tensor]:
    """``(2, length)`` tokens of each length that is compared."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(num_ids, (2, length), generator=generator) for length in COMPARED_LENGTHS]


def _compare(
    decoder: Decoder,
    there: PreTrainedModel,
    batches: list[Tensor],
    words: list[Tensor | None],
    tolerance: float,
) -> Comparison:
    ours = [decoder.logits(tokens, word_starts=starts)[0] for tokens, starts in zip(batches, words, strict=True)]
    theirs = [there(input_ids=tokens).logits for tokens in batches]
    largest = _largest_difference(ours, theirs)
    noise = None if largest <= tolerance else _rounding_noise(decoder, batches, words, ours)
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


def _relative_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    expected, found = (torch.cat([logits.flatten() for logits in side]) for side in (ours, theirs))
    return ((found - expected).norm() / expected.norm()).item()


def _word_starts(decoder: Decoder, tokenizer: Tokenizer, tokens: Tensor) -> Tensor | None:
    """Where words start in ``(batch, sequence)`` tokens, each boundary mark a word; None for models that read none."""
    if not decoder.model.reads_word_starts:
        return None
    starts = torch.ones_like(tokens, dtype=torch.bool)
    for row, ids in enumerate(tokens.tolist()):
        begin = 0
        while begin < len(ids):
            end = ids.index(tokenizer.boundary_id, begin) if tokenizer.boundary_id in ids[begin:] else len(ids)
            text = bytes(ids[begin:end])
            if end == len(ids):
                # The sequence may go on, and end within a character.
                found = tokenizer.word_starts(text)
            else:
                found = split_word_starts(tokenizer.encode(text))[1]
            starts[row, begin:end] = torch.from_numpy(found)
            begin = end + 1
    return starts


def _rounding_noise(decoder: Decoder, batches: list[Tensor], words: list[Tensor | None], logits: list[Tensor]) -> float:
    """How far logits move when every embedding changes by a random relative amount of about its last bit."""
    weight = decoder.embedding.weight
    original = weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    try:
        for _ in range(_PERTURBATIONS):
            weight.copy_(original * (1 + _LAST_BIT * torch.randn(original.shape, generator=generator)))
            moved = [decoder.logits(tokens, word_starts=own)[0] for tokens, own in zip(batches, words, strict=True)]
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
