"""Import: a Hugging Face directory becomes a checkpoint of step 0, from which training goes on under any layout.

Its configuration becomes our model section, its tensors our parameters, one after the other. The result is written
beside its place, read back, compared with the class of ``transformers``, and only then renamed.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.config import HuggingFaceTokenizer
from data.errors import DataError
from data.tokenizers import open_tokenizer
from data.tokenizers.huggingface import open_library_tokenizer
from pretrain.checkpoint.shards import write_durably
from pretrain.checkpoint.training import state_of_import
from pretrain.checkpoint.writer import DEFAULT_MAX_SHARD_BYTES, write_checkpoint
from pretrain.config import Config, dump_config, parse_config, read_merged
from pretrain.convert.class_configuration import ClassConfiguration, read_class_configuration
from pretrain.convert.comparison import LOGIT_TOLERANCE, Comparison, compare_with_class
from pretrain.convert.incoming_weights import IncomingWeights, check_size
from pretrain.convert.output import check_output, whole_directory
from pretrain.convert.weight_files import WeightFiles, confined_file, is_text, read_json_object
from pretrain.errors import CheckError, InputError
from pretrain.models.loading import for_one_process, load_decoder, parameter_shapes
from pretrain.plan import plan

CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"

_UNCHOSEN = "???"
# What only the user can say. The checkpoint itself needs some value for each, as every run's does; nothing that is done
# with a checkpoint looks at them but ``evaluate``, which then reads Python's own standard library.
TO_CHOOSE: dict[str, dict[str, Any]] = {
    "data": {"source": {"type": "standard_library"}, "sequence_length": 2048},
    "optimizer": {"learning_rate": 1e-4},
    "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
}
_HEADER = """\
# Goes on with the weights beside this file:
#   pretrain train {config} --resume {output}
# First choose what stands as ???, here or as KEY=VALUE behind the file.
"""


@dataclass(frozen=True)
class ImportReport:
    """What was imported.

    Attributes:
        output: the directory: ``step-00000000`` (the checkpoint), ``config.yaml``, and the tokenizer where it came too.
        source: where the weights come from.
        architecture: their class.
        parameters: number of weights, now float32.
        comparison: our logits beside the class's; None where that was not asked for.
        tokenizer: one sentence about what became of it.
        chosen: whether the configuration is complete, so that training may begin.
        notes: what the source says that makes no difference here, a sentence each.
    """

    output: Path
    source: Path
    architecture: str
    parameters: int
    comparison: Comparison | None
    tokenizer: str
    chosen: bool
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.parameters:,} float32 weights of {self.architecture} in {self.source}, step 0"]
        if self.comparison is None:
            lines.append("logits were not compared")
        else:
            lines.append(
                f"read back and compared with transformers: logits differ by at most "
                f"{self.comparison.largest_difference:.2g} (tolerance {self.comparison.tolerance:g}) on sequences of "
                f"{', '.join(map(str, self.comparison.lengths))} tokens"
            )
        lines += [self.tokenizer, *self.notes]
        config = self.output / CONFIG_FILE
        first = "" if self.chosen else f"choose what stands as ??? in {config}, then "
        lines.append(f"{first}pretrain train {config} --resume {self.output}")
        return "\n".join(lines)


def import_model(
    directory: Path,
    output: Path,
    *,
    base: Path | None = None,
    check: bool = True,
    tolerance: float = LOGIT_TOLERANCE,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> ImportReport:
    """Writes a checkpoint of step 0, with a configuration to go on with, from a Hugging Face directory.

    Nothing of the directory is executed. Weights of any of the dtypes that float32 holds are stored as float32; there
    are no optimizer moments.

    Args:
        directory: ``config.json`` and safetensors files of a native class.
        output: a directory that does not exist or is empty.
        base: a configuration without a model section, for all that the directory cannot say; None leaves that open.
        check: whether both models are loaded whole and compared, which takes 8 bytes a parameter.
        tolerance: largest absolute difference of a logit, in float32, that passes.
        max_shard_bytes: of one file of the checkpoint, and about what is held in memory while it is written.

    Raises:
        InputError: the model is of no class that can be imported, has a field that ours cannot express, its weights
            are not those of its configuration, no tokenizer can be used, or the output exists.
        CheckError: what was written does not give the class's logits.
        CheckpointError: the checkpoint could not be written.
    """
    directory, output = Path(directory), Path(output)
    check_output(output, "import into")
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; give one that holds config.json and safetensors files")
    output = output.resolve()
    files = WeightFiles(directory)
    there = read_class_configuration(directory, len(files.tensors))
    given = None if base is None else read_base(base)
    if given is not None and "tokenizer" in _section(given, "data"):
        tokenizer, about_tokenizer = None, f"data.tokenizer is that of {base}"
    else:
        tokenizer = _find_tokenizer(directory, there, output)
        about_tokenizer = f"the tokenizer came too, with {tokenizer.boundary_token} between documents"
    config = _configuration(there, given, tokenizer, base, output)
    notes = (*there.notes, *there.compare(config.model))

    alone = for_one_process(config, str(there.path))
    check_size(plan(alone).parameters, files, there.path)
    shapes = parameter_shapes(alone)
    weights = IncomingWeights(there.native, config.model, shapes, files, there.factors(config.model, shapes))
    origin = {"architecture": there.native.architecture, "directory": str(directory.resolve())}
    comparison = None
    with whole_directory(output) as unfinished:
        write_checkpoint(unfinished, 0, weights, state_of_import(config, origin), max_shard_bytes=max_shard_bytes)
        files.close()
        if tokenizer is not None:
            write_durably(unfinished / TOKENIZER_FILE, (directory / TOKENIZER_FILE).read_text(encoding="utf-8"))
        write_durably(unfinished / CONFIG_FILE, config_text(config, given is not None, output))
        if check:
            comparison = _compare(unfinished, directory, there, tolerance)
    return ImportReport(
        output=output,
        source=directory,
        architecture=there.native.architecture,
        parameters=sum(math.prod(shape) for shape in weights.shapes.values()),
        comparison=comparison,
        tokenizer=about_tokenizer,
        chosen=given is not None,
        notes=notes,
    )


def read_base(base: Path) -> dict[str, Any]:
    """A configuration without a model section, not yet validated.

    Raises:
        InputError: it cannot be read, or has one.
    """
    raw = read_merged(base)
    if "model" in raw:
        raise InputError(
            f"{base}: has a model section, but the model is that of the weights; take the section, "
            f"or the file under 'base' that has it, out"
        )
    return raw


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    section = raw.get(name)
    return section if isinstance(section, dict) else {}


def _configuration(
    there: ClassConfiguration,
    given: dict[str, Any] | None,
    tokenizer: HuggingFaceTokenizer | None,
    base: Path | None,
    output: Path,
) -> Config:
    """The run that goes on with the model; with some value for all that is still open where ``given`` is None."""
    raw = copy.deepcopy(TO_CHOOSE) if given is None else given
    raw.setdefault("run", {"directory": f"runs/{output.name}"})
    if tokenizer is not None:
        raw["data"] = _section(raw, "data") | {"tokenizer": tokenizer.model_dump()}
    raw["model"] = there.model_section()
    return parse_config(raw, str(there.path) if base is None else f"{there.path} with {base}")


def config_text(config: Config, chosen: bool, output: Path) -> str:
    """``config.yaml`` beside the weights in ``output``; what is not ``chosen`` yet stands as ``???``."""
    header = _HEADER.format(config=output / CONFIG_FILE, output=output)
    if chosen:
        return "".join(header.splitlines(keepends=True)[:2]) + dump_config(config)
    raw = config.model_dump(mode="json")
    shown = {name: raw[name] for name in ("run", "model", "distillation") if raw[name] is not None}
    shown |= {name: dict.fromkeys(keys, _UNCHOSEN) for name, keys in TO_CHOOSE.items()}
    shown["data"]["tokenizer"] = raw["data"]["tokenizer"]
    return header + yaml.safe_dump(shown, sort_keys=False)


def _find_tokenizer(directory: Path, there: ClassConfiguration, output: Path) -> HuggingFaceTokenizer:
    """The directory's tokenizer as it will be used from ``output``.

    Raises:
        InputError: there is none that text can be read with and back.
    """
    cure = "give --config BASE.yaml with a data.tokenizer"
    if not (directory / TOKENIZER_FILE).exists():
        raise InputError(f"{directory} holds no {TOKENIZER_FILE}; {cure}")
    path = confined_file(directory, TOKENIZER_FILE)
    try:
        mark = _boundary_token(directory, there, path)
        tokenizer = open_tokenizer(HuggingFaceTokenizer(type="huggingface", path=str(path), boundary_token=mark))
    except DataError as error:
        raise InputError(f"{path} cannot be used to train with: {error} Else {cure}") from None
    if tokenizer.vocab_size > there.fields["vocab_size"]:
        raise InputError(
            f"{path} has {tokenizer.vocab_size} ids, more than vocab_size={there.fields['vocab_size']} in "
            f"{there.path}; {cure}"
        )
    return HuggingFaceTokenizer(type="huggingface", path=str(output / TOKENIZER_FILE), boundary_token=mark)


def _boundary_token(directory: Path, there: ClassConfiguration, path: Path) -> str:
    """The token that documents ended with: the end of a text, or else its begin.

    Raises:
        InputError: neither file names one.
    """
    ids = there.fields
    named = read_json_object(directory, _TOKENIZER_CONFIG) if (directory / _TOKENIZER_CONFIG).exists() else {}
    library = open_library_tokenizer(str(path))
    for kind in ("eos_token", "bos_token"):
        token = named.get(kind)
        token = token.get("content") if isinstance(token, dict) else token
        number = ids.get(f"{kind}_id")
        number = number[0] if isinstance(number, list) and number else number
        if not token and isinstance(number, int) and 0 <= number < ids["vocab_size"]:
            token = library.id_to_token(number)
        if isinstance(token, str) and token:
            if not is_text(token):
                raise InputError(f"{directory / _TOKENIZER_CONFIG}: {kind} is {token!r}, which holds half a character")
            return token
    raise InputError(
        f"{directory}: neither {_TOKENIZER_CONFIG} nor {there.path.name} names an eos_token or bos_token, which mark "
        f"documents; add it there"
    )


def _compare(unfinished: Path, directory: Path, there: ClassConfiguration, tolerance: float) -> Comparison:
    loaded = load_decoder(unfinished)
    comparison = compare_with_class(
        loaded.decoder, directory, there.native.architecture, there.config, tolerance=tolerance
    )
    if not comparison.agrees:
        raise CheckError(
            f"the imported model's logits differ from those of {there.native.architecture} by "
            f"{comparison.largest_difference:.3g}, more than {comparison.tolerance:.3g}; nothing was left. Changing "
            f"this model's embeddings in their last bit moves its logits by {comparison.noise:.3g}: where that is "
            f"nearly as much, the difference is rounding, and a larger --tolerance accepts it"
        )
    return comparison
