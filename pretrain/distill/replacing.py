"""A student: a checkpoint in which recurrent layers stand for attention layers of another, and all else is the same.

How a mixer begins with attention's weights is its own to say, in the ``from_attention.py`` of its folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import CheckpointReader, resolve_checkpoint
from pretrain.checkpoint.shards import TensorPiece, write_durably
from pretrain.checkpoint.training import begins_a_run, state_of_import
from pretrain.checkpoint.writer import write_checkpoint
from pretrain.config import Config, parse_config
from pretrain.config.model import ModelConfig
from pretrain.convert.importing import CONFIG_FILE, config_text, read_base
from pretrain.convert.output import check_output, whole_directory
from pretrain.errors import InputError
from pretrain.models.attention.config import AttentionConfig
from pretrain.models.loading import for_one_process, parameter_shapes
from pretrain.models.mixer_config import MixerConfig
from pretrain.models.registry import sequence_mixers

# Keys of a layout with which a student cannot learn from a teacher.
_NO_TEACHER = ("pipeline", "context", "context_scheme", "expert", "data")


@dataclass(frozen=True)
class ReplacementReport:
    """What was replaced.

    Attributes:
        output: the directory: ``step-00000000`` (the checkpoint) and ``config.yaml``.
        teacher: the checkpoint that the weights come from.
        layers: those that were replaced.
        mixer: by what.
        parameters: of the student.
        chosen: whether the configuration is complete, so that training may begin.
        lost: what of the attention layers the new ones do not have, in words; empty where nothing.
    """

    output: Path
    teacher: Path
    layers: tuple[int, ...]
    mixer: str
    parameters: int
    chosen: bool
    lost: tuple[str, ...]

    def __str__(self) -> str:
        replaced = ", ".join(map(str, self.layers))
        lines = [
            f"{self.output}: {self.parameters:,} float32 weights, step 0; attention of layers {replaced} of "
            f"{self.teacher} became {self.mixer}, everything else is copied"
        ]
        if self.lost:
            lines.append(f"not taken over: {', '.join(self.lost)}")
        config = self.output / CONFIG_FILE
        first = "" if self.chosen else f"choose what stands as ??? in {config}, then "
        lines.append(f"{first}pretrain train {config} --resume {self.output}")
        return "\n".join(lines)


def parse_layers(text: str) -> list[int]:
    """Layers as the command line has them: numbers with commas between.

    Raises:
        InputError: something else is there.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"--layers {text!r}: expected numbers of layers with commas between, for instance 3,5,7")
    return sorted({int(part) for part in parts})


def replace_layers(
    source: Path, output: Path, layers: Sequence[int], mixer: str, *, base: Path | None = None
) -> ReplacementReport:
    """Writes a student of step 0, with a configuration in which ``source`` is the teacher.

    One tensor at a time is read, of a replaced layer those of its mixer.

    Args:
        source: a run or a checkpoint.
        output: a directory that does not exist or is empty.
        layers: attention layers, counted from 0.
        mixer: name of a sequence mixer that says how it begins with attention's weights.
        base: a configuration without a model section, for all else; None: that of the source's run, or, where the
            source was imported, what is still to be chosen.

    Raises:
        InputError: a layer has no attention, the mixer cannot stand for it, or the output exists.
        CheckpointError: the checkpoint could not be written.
    """
    output = Path(output)
    check_output(output, "write the student into")
    output, teacher = output.resolve(), resolve_checkpoint(Path(source)).resolve()
    form = _form_of(mixer)
    with CheckpointReader(teacher) as reader:
        config = parse_config(reader.state["config"], f"configuration in {teacher}")
        chosen = base is not None or not begins_a_run(reader)
        attention = {layer: _attention(config.model, layer, teacher) for layer in layers}
        student = _student_config(config, attention, form, base, output, teacher)
        shapes = parameter_shapes(for_one_process(student, str(output)))
        origin = {"teacher": str(teacher), "replaced_layers": list(layers), "mixer": mixer}
        with whole_directory(output) as unfinished:
            pieces = _pieces(reader, student.model, attention, form, shapes)
            write_checkpoint(unfinished, 0, pieces, state_of_import(student, origin))
            write_durably(unfinished / CONFIG_FILE, config_text(student, chosen, output))
    return ReplacementReport(
        output=output,
        teacher=teacher,
        layers=tuple(layers),
        mixer=mixer,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        chosen=chosen,
        lost=tuple(_lost(list(attention.values()))),
    )


def _form_of(mixer: str) -> ModuleType:
    families = sequence_mixers()
    known = [name for name, family in families.items() if family.from_attention is not None]
    if mixer not in known:
        raise InputError(f"--with {mixer}: no layer of it is made from attention; take one of {', '.join(known)}")
    return families[mixer].from_attention


def _attention(model: ModelConfig, layer: int, teacher: Path) -> AttentionConfig:
    if model.hierarchy is not None:
        raise InputError(f"{teacher}: is a hierarchy ({model.hierarchy.type}), whose layers are not replaced")
    if layer >= model.num_layers:
        raise InputError(f"{teacher}: has no layer {layer}; layers are counted from 0 to {model.num_layers - 1}")
    found = model.block(layer).mixer
    if not isinstance(found, AttentionConfig):
        others = [i for i in range(model.num_layers) if isinstance(model.block(i).mixer, AttentionConfig)]
        raise InputError(
            f"{teacher}: layer {layer} has {found.type if found else 'no sequence mixer'}, not attention; layers with "
            f"attention: {', '.join(map(str, others)) or 'none'}"
        )
    return found


def _student_config(
    config: Config,
    attention: dict[int, AttentionConfig],
    form: ModuleType,
    base: Path | None,
    output: Path,
    teacher: Path,
) -> Config:
    raw = config.model_dump(mode="json")
    if base is not None:
        raw = read_base(base) | {"model": raw["model"]}
    else:
        raw["parallel"] = {key: value for key, value in raw["parallel"].items() if key not in _NO_TEACHER}
        raw["train"]["carry_state"] = False
        raw["run"] = {"directory": f"runs/{output.name}"}
        raw["distillation"] = None
    raw.setdefault("run", {"directory": f"runs/{output.name}"})
    raw["distillation"] = {**(raw.get("distillation") or {}), "teacher": str(teacher)}
    model = raw["model"]
    names = [config.model.layers[layer % len(config.model.layers)] for layer in range(config.model.num_layers)]
    blocks: dict[str, Any] = {}
    for layer, name in enumerate(names):
        block = model["blocks"][name]
        if layer in attention:
            try:
                section = form.section(attention[layer], config.model.hidden_size)
            except InputError as error:
                raise InputError(f"{teacher}: layer {layer}: {error}") from None
            name = f"{name}_as_{section['type']}"
            block = {**block, "mixer": section}
            if name in model["blocks"]:
                raise InputError(f"{teacher}: already has a block named {name!r}")
            names[layer] = name
        blocks[name] = block
    raw["model"] = {**model, "layers": names, "blocks": blocks}
    return parse_config(raw, str(output if base is None else base))


def _pieces(
    reader: CheckpointReader,
    student: ModelConfig,
    attention: dict[int, AttentionConfig],
    form: ModuleType,
    shapes: dict[str, tuple[int, ...]],
) -> Iterator[TensorPiece]:
    """The student's weights, one after the other."""
    prefixes = {layer: f"layers.{layer}.mixer." for layer in attention}
    for name, shape in shapes.items():
        if not name.startswith(tuple(prefixes.values())):
            yield TensorPiece(name, "weight", reader.read(name), shape)
    for layer, prefix in prefixes.items():
        made = _replaced(reader, prefix, attention[layer], student.block(layer).mixer, student.hidden_size, form)
        expected = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        found = {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in made.items()}
        if found != expected:
            raise RuntimeError(f"{form.__name__} makes {found}, where the layer has {expected}")
        for name, tensor in made.items():
            yield TensorPiece(f"{prefix}{name}", "weight", tensor.contiguous(), shapes[f"{prefix}{name}"])


@torch.no_grad()
def _replaced(
    reader: CheckpointReader,
    prefix: str,
    attention: AttentionConfig,
    own: MixerConfig,
    hidden_size: int,
    form: ModuleType,
) -> dict[str, Tensor]:
    names = [name for name in reader.names("weight") if name.startswith(prefix)]
    source = {name.removeprefix(prefix): reader.read(name) for name in names}
    return form.weights(attention, own, hidden_size, source)


def _lost(attention: Sequence[AttentionConfig]) -> Iterator[str]:
    if any(layer.rotary_fraction for layer in attention):
        yield "rotary positions"
    if any(layer.query_key_norm for layer in attention):
        yield "norms of queries and keys, but for their weights"
    if any(layer.sliding_window for layer in attention):
        yield "windows"
