"""Export: a checkpoint becomes a directory that ``transformers`` loads without any code of ours.

The directory is written beside its place, loaded back, compared with our model, and only then renamed.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import save_torch_state_dict

from data.errors import DataError
from data.tokenizers import Tokenizer, open_tokenizer
from pretrain.config.schema import ModelConfig
from pretrain.convert import xlstm
from pretrain.convert.comparison import LOGIT_TOLERANCE, Comparison, compare_with_transformers
from pretrain.convert.tokenizer import write_tokenizer
from pretrain.errors import CheckError, InputError
from pretrain.models.decoder import Decoder
from pretrain.models.loading import load_decoder

# One module for each native class; the first that fits is taken.
NATIVE_CLASSES: tuple[ModuleType, ...] = (xlstm,)

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        output: the directory.
        checkpoint: that the weights come from.
        step: optimizer steps that they were trained for.
        architecture: the ``transformers`` class.
        parameters: number of weights, float32.
        comparison: the exported model's logits beside ours.
        cached_generation: whether ``generate`` carries the recurrent state from token to token; False where
            the class's cache cannot hold a state of this model's sizes, so that each token reads all before it.
    """

    output: Path
    checkpoint: Path
    step: int
    architecture: str
    parameters: int
    comparison: Comparison
    cached_generation: bool

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {self.architecture}, {self.parameters:,} float32 weights of {self.checkpoint} "
            f"(step {self.step})",
            f"loaded with transformers and compared: logits differ by at most "
            f"{self.comparison.largest_difference:.2g} on sequences of "
            f"{', '.join(map(str, self.comparison.lengths))} tokens",
        ]
        if not self.cached_generation:
            lines.append(
                "generate() will read the whole text for each token: the class's cache holds only states whose "
                "key and value widths are multiples of 64"
            )
        return "\n".join(lines)


def export_model(
    path: Path, output: Path, *, max_shard_size: str | int = MAX_SHARD_SIZE, tolerance: float = LOGIT_TOLERANCE
) -> ExportReport:
    """Writes a model as a Hugging Face directory: configuration, float32 weights, tokenizer.

    Nothing is left at ``output`` unless the directory was loaded with ``transformers`` and its logits are ours
    on random tokens, but for rounding. The native classes know no document boundaries
    within a sequence: they agree with our model on sequences of one document.

    Args:
        path: a run or a checkpoint.
        output: a directory that does not exist or is empty.
        tolerance: largest absolute difference of a logit, in float32, that passes.
        max_shard_size: largest weight file, in bytes or as ``"5GB"``; a larger model is split, with an index.

    Raises:
        InputError: no native class holds this model, the tokenizer has no Hugging Face form, the output
            exists, or the checkpoint is not sound.
        CheckError: what was written does not give our logits or our tokens.
    """
    output = Path(output)
    _check_output(output)
    output = output.resolve()
    loaded = load_decoder(path)
    model = loaded.config.model
    native = _native_class(model)
    fields = native.config_fields(model)
    try:
        tokenizer = open_tokenizer(loaded.config.data.tokenizer)
    except DataError as error:
        raise InputError(f"the run's tokenizer cannot be exported: {error}") from error
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"the run's tokenizer has {tokenizer.vocab_size} ids, but model.vocab_size is {model.vocab_size}; the "
            f"tokenizer file has changed since the run"
        )

    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        write_tokenizer(loaded.config.data.tokenizer, tokenizer, unfinished)
        cached = native.can_cache_state(fields)
        _write_configs(native, fields, tokenizer, cached, unfinished)
        _write_weights(loaded.decoder, native.tensor_names(model), unfinished, max_shard_size)
        comparison = compare_with_transformers(loaded.decoder, tokenizer.vocab_size, unfinished, tolerance)
        if not comparison.agrees:
            raise CheckError(
                f"the exported model's logits differ from ours by {comparison.largest_difference:.3g}, more than "
                f"{comparison.tolerance:.3g}; nothing was left in {output}. Changing this model's embeddings in their "
                f"last bit moves its logits by {comparison.noise:.3g}: where that is nearly as much, the difference "
                f"is rounding, and a larger --tolerance accepts it"
            )
        if output.exists():
            output.rmdir()
        os.rename(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return ExportReport(
        output=output,
        checkpoint=loaded.checkpoint,
        step=loaded.step,
        architecture=native.ARCHITECTURE,
        parameters=sum(parameter.numel() for parameter in loaded.decoder.parameters()),
        comparison=comparison,
        cached_generation=cached,
    )


def _check_output(output: Path) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"{output} is not a directory; give the name of a new one to export into")
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} is not empty; give the name of a new directory to export into")


def _native_class(model: ModelConfig) -> ModuleType:
    reasons = []
    for native in NATIVE_CLASSES:
        unfit = native.unfit_layers(model)
        if not unfit:
            return native
        more = f" and {len(unfit) - 4} more" if len(unfit) > 4 else ""
        reasons.append(f"{native.ARCHITECTURE} cannot hold {', '.join(unfit[:4])}{more}")
    raise InputError(f"no native transformers class holds this model yet: {'; '.join(reasons)}")


def _write_configs(
    native: ModuleType, fields: dict[str, Any], tokenizer: Tokenizer, cached: bool, directory: Path
) -> None:
    from transformers import CONFIG_MAPPING, GenerationConfig

    boundary_id = tokenizer.boundary_id
    marks = {"bos_token_id": boundary_id, "eos_token_id": boundary_id, "pad_token_id": boundary_id}
    config = CONFIG_MAPPING[native.MODEL_TYPE](architectures=[native.ARCHITECTURE], dtype="float32", **fields, **marks)
    config.save_pretrained(directory)
    # Rows that only pad the vocabulary stand for no token; our own generation never draws them either.
    padding = list(range(tokenizer.vocab_size, fields["vocab_size"])) or None
    GenerationConfig(use_cache=cached, suppress_tokens=padding, **marks).save_pretrained(directory)


def _write_weights(decoder: Decoder, names: dict[str, str], directory: Path, max_shard_size: str | int) -> None:
    weights = dict(decoder.named_parameters())
    if set(names) != set(weights):
        raise CheckError(f"parameters without a Hugging Face name: {sorted(set(names) ^ set(weights))}")
    state = {names[name]: weight.detach() for name, weight in weights.items()}
    save_torch_state_dict(state, directory, max_shard_size=max_shard_size, metadata={"format": "pt"})
    for file in directory.glob("*.safetensors"):
        # Written readable by their owner alone, unlike the other files.
        shutil.copymode(directory / "config.json", file)
