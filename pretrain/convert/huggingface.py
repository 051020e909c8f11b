"""Export: a checkpoint becomes a directory that ``transformers`` loads without this package.

Where a native class of ``transformers`` holds the model, the directory is of that class; otherwise it brings the
code of its mixers, for ``trust_remote_code=True``. Weights go from the checkpoint's files to the directory's without
the model ever being whole in memory. The directory is written beside its place, loaded back, compared with our
model, and only then renamed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.config import TokenizerConfig
from data.errors import DataError
from data.tokenizers import Tokenizer, open_tokenizer
from pretrain.checkpoint import CheckpointReader, resolve_checkpoint
from pretrain.config.model import ModelConfig
from pretrain.convert import custom
from pretrain.convert.comparison import BFLOAT16_TOLERANCE, LOGIT_TOLERANCE, Comparison, compare_with_transformers
from pretrain.convert.custom import CustomForm
from pretrain.convert.model_card import read_training, write_model_card
from pretrain.convert.native import NativeForm, first_native_form
from pretrain.convert.native_classes import NATIVE_CLASSES
from pretrain.convert.outgoing_weights import DTYPES, OutgoingWeights, parse_size
from pretrain.convert.output import check_output, whole_directory
from pretrain.convert.tokenizer import write_tokenizer
from pretrain.errors import CheckError, InputError
from pretrain.models.loading import check_tensors, for_one_process, load_decoder, parameter_shapes, stored_configuration

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        output: the directory.
        checkpoint: that the weights come from.
        step: optimizer steps that they were trained for.
        architecture: the class that loads it.
        parameters: number of weights.
        dtype: of the weights: ``float32`` or ``bfloat16``.
        loaded_dtype: in which they are loaded unless a user says otherwise.
        kept_float32: how many of them are float32 beside that.
        files: number of weight files.
        comparison: the exported model's logits beside ours; None where that was not asked for.
        cached_generation: whether ``generate`` carries the recurrent state from token to token; False where
            the class's cache cannot hold a state of this model's sizes, or the model reads words, so that each token
            reads all before it.
        needs_code: whether the directory brings its own code.
        unfit: why each native class cannot hold the model, where none can.
    """

    output: Path
    checkpoint: Path
    step: int
    architecture: str
    parameters: int
    dtype: str
    loaded_dtype: str
    kept_float32: int
    files: int
    comparison: Comparison | None
    cached_generation: bool
    needs_code: bool
    unfit: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {self.architecture}, {self.parameters:,} {self.dtype} weights of {self.checkpoint} "
            f"(step {self.step}) in {self.files} file{'s' if self.files > 1 else ''}"
        ]
        if self.dtype != "float32":
            lines.append(
                f"{self.kept_float32:,} of them, which training never rounds, are float32"
                if self.kept_float32
                else f"all of them are, since {self.architecture} loads norms and gates in the dtype of the rest"
            )
        if self.loaded_dtype != self.dtype:
            lines.append(
                f"config.json says {self.loaded_dtype}: {self.architecture} computes in nothing else without the "
                f"kernels of another package"
            )
        lines.append(self._about_comparison())
        if not self.cached_generation:
            reason = "the class's cache holds only states whose key and value widths are multiples of 64"
            if self.needs_code:
                reason = "a byte may change how the end of its text is cut into words"
            lines.append(f"generate() will read the whole text for each token: {reason}")
        if self.needs_code:
            lines += ["load it with trust_remote_code=True: no class of transformers holds this model", *self.unfit]
        lines.append("README.md is its model card; the licence is yours to name there")
        return "\n".join(lines)

    def _about_comparison(self) -> str:
        if self.comparison is None:
            return "logits were not compared"
        text = (
            f"loaded with transformers and compared: logits differ by at most "
            f"{self.comparison.largest_difference:.2g} (tolerance {self.comparison.tolerance:g}) in float32 on "
            f"sequences of {', '.join(map(str, self.comparison.lengths))} tokens"
        )
        if self.comparison.in_bfloat16 is not None:
            text += f"; computed in bfloat16 by {self.comparison.in_bfloat16:.2g} of their root mean square"
        return text


def export_model(
    path: Path,
    output: Path,
    *,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    dtype: str | None = None,
    check: bool = True,
    tolerance: float = LOGIT_TOLERANCE,
) -> ExportReport:
    """Writes a model as a Hugging Face directory: configuration, weights, tokenizer, model card, code if it needs any.

    Without ``check`` the most that is in memory is one weight file and a part of a tensor. With it, nothing is left
    at ``output`` unless the directory was loaded with ``transformers`` and its logits are ours on random tokens, but
    for rounding; that takes 8 bytes a parameter.

    Args:
        path: a run or a checkpoint.
        output: a directory that does not exist or is empty.
        max_shard_size: largest weight file, in bytes or as ``"5GB"``; a larger model is split, with an index.
        dtype: of the weights, ``float32`` or ``bfloat16``; None: ``train.precision`` of the run, so that the exported
            model computes as the run did. Rounded weights are compared with ours rounded likewise.
        check: whether both models are loaded whole and compared.
        tolerance: largest absolute difference of a logit, in float32, that passes.

    Raises:
        InputError: neither a native class nor code of its own can hold this model, the tokenizer has no Hugging
            Face form, the output exists or cannot be written, or the checkpoint is not sound.
        CheckError: what was written does not give our logits or our tokens.
    """
    output = Path(output)
    check_output(output, "export into")
    output, shard_bytes = output.resolve(), parse_size(max_shard_size)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, but is {dtype!r}")
    with CheckpointReader(resolve_checkpoint(Path(path))) as reader:
        config = stored_configuration(reader)
        model, dtype = config.model, dtype or config.train.precision
        form, unfit = choose_form(model, config.data.tokenizer)
        tokenizer = _open_tokenizer(config.data.tokenizer, model.vocab_size)
        shapes = parameter_shapes(for_one_process(config, f"configuration in {reader.path}"))
        check_tensors(reader, shapes, model.num_layers)
        training = read_training(reader)

        kept = _float32_parameters(form, dtype, config.data.tokenizer)
        weights = OutgoingWeights(reader, shapes, form.pieces(shapes), DTYPES[dtype], kept)
        with whole_directory(output) as unfinished:
            write_tokenizer(config.data.tokenizer, tokenizer, unfinished)
            _write_configs(form, tokenizer, model.vocab_size, dtype, unfinished)
            files = weights.write(unfinished, shard_bytes)
            loaded = DTYPES[form.loaded_dtype(dtype)]
            comparison = _compare(weights, loaded, tokenizer, unfinished, tolerance, output) if check else None
            write_model_card(unfinished, output.name, form, config, dtype, shapes, training)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return ExportReport(
        output=output,
        checkpoint=reader.path,
        step=reader.step,
        architecture=form.architecture,
        parameters=sum(sizes.values()),
        dtype=dtype,
        loaded_dtype=form.loaded_dtype(dtype),
        kept_float32=sum(sizes[name] for name in kept),
        files=files,
        comparison=comparison,
        cached_generation=form.cached_generation,
        needs_code=form.needs_code,
        unfit=unfit if form.needs_code else (),
    )


def choose_form(
    model: ModelConfig, tokenizer: TokenizerConfig | None = None
) -> tuple[NativeForm | CustomForm, tuple[str, ...]]:
    """The first native class that holds the model, or code of its own; and why the classes before do not.

    ``tokenizer`` is the run's, which models that read words need.

    Raises:
        InputError: a mixer of the model has neither; says why of each class.
    """
    native, unfit = first_native_form(NATIVE_CLASSES, model)
    if native is not None:
        return native, tuple(unfit)
    problem = custom.problem(model)
    if problem is not None:
        raise InputError(f"no class of transformers holds this model, and {problem}: {'; '.join(unfit)}")
    return CustomForm(model, tokenizer), tuple(unfit)


def _open_tokenizer(config: TokenizerConfig, vocab_size: int) -> Tokenizer:
    try:
        tokenizer = open_tokenizer(config)
    except DataError as error:
        raise InputError(f"the run's tokenizer cannot be exported: {error}") from error
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the run's tokenizer has {tokenizer.vocab_size} ids, but model.vocab_size is {vocab_size}; the "
            f"tokenizer file has changed since the run"
        )
    return tokenizer


def _float32_parameters(form: NativeForm | CustomForm, dtype: str, tokenizer: TokenizerConfig) -> frozenset[str]:
    """What stays float32 among weights of ``dtype``: what the mixers declare, where the class loads it as it is."""
    if dtype == "float32" or not (form.needs_code or form.loaded_dtype(dtype) == "float32"):
        return frozenset()
    return frozenset(CustomForm(form.model, tokenizer).float32_parameters())


def _write_configs(
    form: NativeForm | CustomForm, tokenizer: Tokenizer, vocab_size: int, dtype: str, directory: Path
) -> None:
    from transformers import GenerationConfig

    boundary_id = tokenizer.boundary_id
    marks = {"bos_token_id": boundary_id, "eos_token_id": boundary_id, "pad_token_id": boundary_id}
    form.write_config(directory, dtype, marks)
    # Rows that only pad the vocabulary stand for no token; our own generation never draws them either.
    padding = list(range(tokenizer.vocab_size, vocab_size)) or None
    generation: dict[str, Any] = {"use_cache": form.cached_generation, "suppress_tokens": padding, **marks}
    GenerationConfig(**generation).save_pretrained(directory)


def _compare(
    weights: OutgoingWeights, dtype: torch.dtype, tokenizer: Tokenizer, directory: Path, tolerance: float, output: Path
) -> Comparison:
    """Loads both models, theirs in ``dtype`` too; raises ``CheckError`` unless their logits agree."""
    decoder = load_decoder(weights.reader.path).decoder
    for name, parameter in decoder.named_parameters():
        parameter.copy_(weights.rounded(name, parameter))
    comparison = compare_with_transformers(decoder, tokenizer, directory, tolerance, dtype)
    if comparison.agrees:
        return comparison
    if comparison.in_bfloat16 is not None:
        raise CheckError(
            f"the exported model's logits agree with ours in float32, but differ by {comparison.in_bfloat16:.3g} of "
            f"their root mean square where it computes in bfloat16, more than {BFLOAT16_TOLERANCE:g}; nothing was left "
            f"in {output}. Rounding seems too coarse for this model: export it with --dtype float32"
        )
    raise CheckError(
        f"the exported model's logits differ from ours by {comparison.largest_difference:.3g}, more than "
        f"{comparison.tolerance:.3g}; nothing was left in {output}. Changing this model's embeddings in their "
        f"last bit moves its logits by {comparison.noise:.3g}: where that is nearly as much, the difference "
        f"is rounding, and a larger --tolerance accepts it"
    )
