"""Export: a checkpoint becomes a directory that ``transformers`` loads without this package.

Where a native class of ``transformers`` holds the model, the directory is of that class; otherwise it brings the
code of its mixers, for ``trust_remote_code=True``. It is written beside its place, loaded back, compared with our
model, and only then renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from data.config import TokenizerConfig
from data.errors import DataError
from data.tokenizers import Tokenizer, open_tokenizer
from pretrain.config.schema import ModelConfig
from pretrain.convert import custom
from pretrain.convert.comparison import LOGIT_TOLERANCE, Comparison, compare_with_transformers
from pretrain.convert.custom import CustomForm
from pretrain.convert.native import NativeForm, first_native_form
from pretrain.convert.native_classes import NATIVE_CLASSES
from pretrain.convert.output import check_output, whole_directory
from pretrain.convert.tokenizer import write_tokenizer
from pretrain.errors import CheckError, InputError
from pretrain.models.loading import load_decoder

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        output: the directory.
        checkpoint: that the weights come from.
        step: optimizer steps that they were trained for.
        architecture: the class that loads it.
        parameters: number of weights, float32.
        comparison: the exported model's logits beside ours.
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
    comparison: Comparison
    cached_generation: bool
    needs_code: bool
    unfit: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {self.architecture}, {self.parameters:,} float32 weights of {self.checkpoint} "
            f"(step {self.step})",
            f"loaded with transformers and compared: logits differ by at most "
            f"{self.comparison.largest_difference:.2g} on sequences of "
            f"{', '.join(map(str, self.comparison.lengths))} tokens",
        ]
        if not self.cached_generation:
            reason = "the class's cache holds only states whose key and value widths are multiples of 64"
            if self.needs_code:
                reason = "a byte may change how the end of its text is cut into words"
            lines.append(f"generate() will read the whole text for each token: {reason}")
        if self.needs_code:
            lines += ["load it with trust_remote_code=True: no class of transformers holds this model", *self.unfit]
        return "\n".join(lines)


def export_model(
    path: Path, output: Path, *, max_shard_size: str | int = MAX_SHARD_SIZE, tolerance: float = LOGIT_TOLERANCE
) -> ExportReport:
    """Writes a model as a Hugging Face directory: configuration, float32 weights, tokenizer, code if it needs any.

    Nothing is left at ``output`` unless the directory was loaded with ``transformers`` and its logits are ours
    on random tokens, but for rounding. The exported models know no document boundaries
    within a sequence: they agree with our model on sequences of one document.

    Args:
        path: a run or a checkpoint.
        output: a directory that does not exist or is empty.
        tolerance: largest absolute difference of a logit, in float32, that passes.
        max_shard_size: largest weight file, in bytes or as ``"5GB"``; a larger model is split, with an index.

    Raises:
        InputError: neither a native class nor code of its own can hold this model, the tokenizer has no Hugging
            Face form, the output exists, or the checkpoint is not sound.
        CheckError: what was written does not give our logits or our tokens.
    """
    output = Path(output)
    check_output(output, "export into")
    output = output.resolve()
    loaded = load_decoder(path)
    model = loaded.config.model
    form, unfit = choose_form(model, loaded.config.data.tokenizer)
    try:
        tokenizer = open_tokenizer(loaded.config.data.tokenizer)
    except DataError as error:
        raise InputError(f"the run's tokenizer cannot be exported: {error}") from error
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"the run's tokenizer has {tokenizer.vocab_size} ids, but model.vocab_size is {model.vocab_size}; the "
            f"tokenizer file has changed since the run"
        )

    weights = {name: weight.detach() for name, weight in loaded.decoder.named_parameters()}
    with whole_directory(output) as unfinished:
        write_tokenizer(loaded.config.data.tokenizer, tokenizer, unfinished)
        _write_configs(form, tokenizer, model.vocab_size, unfinished)
        _write_weights(form.tensors(weights), unfinished, max_shard_size)
        comparison = compare_with_transformers(loaded.decoder, tokenizer, unfinished, tolerance)
        if not comparison.agrees:
            raise CheckError(
                f"the exported model's logits differ from ours by {comparison.largest_difference:.3g}, more than "
                f"{comparison.tolerance:.3g}; nothing was left in {output}. Changing this model's embeddings in their "
                f"last bit moves its logits by {comparison.noise:.3g}: where that is nearly as much, the difference "
                f"is rounding, and a larger --tolerance accepts it"
            )
    return ExportReport(
        output=output,
        checkpoint=loaded.checkpoint,
        step=loaded.step,
        architecture=form.architecture,
        parameters=sum(weight.numel() for weight in weights.values()),
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


def _write_configs(form: NativeForm | CustomForm, tokenizer: Tokenizer, vocab_size: int, directory: Path) -> None:
    from transformers import GenerationConfig

    boundary_id = tokenizer.boundary_id
    marks = {"bos_token_id": boundary_id, "eos_token_id": boundary_id, "pad_token_id": boundary_id}
    form.write_config(directory, marks)
    # Rows that only pad the vocabulary stand for no token; our own generation never draws them either.
    padding = list(range(tokenizer.vocab_size, vocab_size)) or None
    generation: dict[str, Any] = {"use_cache": form.cached_generation, "suppress_tokens": padding, **marks}
    GenerationConfig(**generation).save_pretrained(directory)


def _write_weights(tensors: Mapping[str, Tensor], directory: Path, max_shard_size: str | int) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(contiguous, directory, max_shard_size=max_shard_size, metadata={"format": "pt"})
    for file in directory.glob("*.safetensors"):
        # Written readable by their owner alone, unlike the other files.
        shutil.copymode(directory / "config.json", file)
