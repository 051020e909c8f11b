"""``config.json`` of a native class of ``transformers`` as the model section of our configuration.

Nothing that it says is passed over: the section is turned back into the class's fields by the tables that exports are
written with, and each field must then be the same, unless the class's description says that it changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.model import ModelConfig
from pretrain.convert.native import PARTS, NativeClass
from pretrain.convert.native_classes import NATIVE_CLASSES
from pretrain.convert.weight_files import read_json_object
from pretrain.convert.xlstm import NO_CAP
from pretrain.errors import InputError
from pretrain.models.hugging_face import ANY_TIME_STEP
from pretrain.models.registry import MixerFamily, channel_mixers, sequence_mixers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG_FILE = "config.json"
# Fields of any class that change nothing of its logits.
_FREE = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_position_embeddings",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# A file has a tensor for each layer at least.
_NUMBERS_OF_LAYERS = ("num_hidden_layers", "num_blocks")
_SPECIAL_FLOATS = ("Infinity", "-Infinity", "NaN")


@dataclass(frozen=True)
class ClassConfiguration:
    """What ``config.json`` says, in the terms of a native class of today.

    Attributes:
        path: the file, for messages.
        native: the class.
        config: ``transformers``' configuration.
        notes: what the file says that neither the class reads nor the model section says.
    """

    path: Path
    native: NativeClass
    config: PreTrainedConfig
    notes: tuple[str, ...]

    @property
    def fields(self) -> dict[str, Any]:
        """All that the class's configuration holds, defaults included."""
        return _fields(self.config)

    def model_section(self) -> dict[str, Any]:
        """Our model section, not yet validated.

        Raises:
            InputError: a layer has a type, or a field a value, that ours cannot express.
        """
        fields, native = self.fields, self.native
        names = self._layer_names()
        blocks = {name: self._block(kinds) for name, kinds in dict(names).items()}
        return {
            "vocab_size": fields["vocab_size"],
            "hidden_size": fields["hidden_size"],
            "num_layers": len(names),
            "layers": _shortest_pattern([name for name, _ in names]),
            "blocks": blocks,
            "norm": "rms",
            "norm_epsilon": fields[native.norm_epsilon],
            "tie_embeddings": fields["tie_word_embeddings"],
            **native.model_keys(fields),
        }

    def compare(self, model: ModelConfig) -> tuple[str, ...]:
        """Compares the file with what the class would need to hold ``model``.

        Returns:
            A sentence for each field that differs and changes only where the model rounds.

        Raises:
            InputError: naming every other field that differs.
        """
        problem = self.native.problem(model)
        if problem is not None:
            raise InputError(f"{self.path}: {problem}")
        theirs, ours = self.fields, _fields(_build(self.path, self.native, self.native.config_fields(model)))
        rounding, folded = self.native.rounding, sorted(self.native.folded)
        differing = _differing(self.native, theirs, ours)
        problems = [self._sentence(key, theirs.get(key), ours.get(key)) for key in differing if key not in rounding]
        if problems:
            raise InputError(f"{self.path}: {'; '.join(problems)}")
        notes = [f"{key}={_shown(theirs[key])} was multiplied into the weights" for key in folded if theirs[key] != 1]
        notes += [
            f"{key}={_shown(theirs.get(key))}: here {rounding[key]}, which is the same in float32" for key in differing
        ]
        return tuple(notes)

    def factors(self, model: ModelConfig, parameters: Collection[str]) -> dict[str, float]:
        """By what an import multiplies each of our parameters, beyond what the class itself says of its tensors.

        Raises:
            InputError: a multiplier is no number above 0.
        """
        try:
            return self.native.multipliers(self.fields).factors(model, parameters)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    def _sentence(self, key: str, theirs: Any, ours: Any) -> str:
        cure = f" ({self.native.cures[key]})" if key in self.native.cures else ""
        return f"{key} is {_shown(theirs)}, where only {_shown(ours)} can be imported{cure}"

    def _layer_names(self) -> list[tuple[str, tuple[str | None, str | None]]]:
        """Name of the block of each layer, and its mixers."""
        native = self.native
        if None in native.layers:
            types: list[str | None] = [None] * self.config.num_hidden_layers
        else:
            types = list(self.config.layers_block_type)
        names = []
        layers = native.layers if native.layers_of is None else native.layers_of(self.fields)
        for layer, kind in enumerate(types):
            if kind not in layers:
                known = ", ".join(str(known) for known in layers)
                raise InputError(
                    f"{self.path}: layer {layer} is of type {kind!r}, where one of {known} can be imported"
                )
            names.append((next(name for name in layers[kind] if name), layers[kind]))
        if not names:
            raise InputError(f"{self.path}: the model has no layers")
        return names

    def _block(self, kinds: tuple[str | None, str | None]) -> dict[str, Any]:
        families: list[Mapping[str, MixerFamily]] = [sequence_mixers(), channel_mixers()]
        block = {}
        for part, kind, registered in zip(PARTS, kinds, families, strict=True):
            if kind is not None:
                try:
                    section = registered[kind].hugging_face.SECTIONS[self.native.model_type]
                    block[part] = section(self.fields)
                except InputError as error:
                    raise InputError(f"{self.path}: {error}") from None
        return block


def read_class_configuration(directory: Path, num_tensors: int) -> ClassConfiguration:
    """Reads and checks ``config.json``.

    Args:
        directory: of the model.
        num_tensors: how many its files hold, more than which the model cannot have layers.

    Raises:
        InputError: there is no such file, it is of another class, has a field that nothing is known of, or one that
            the class refuses.
    """
    path = directory / CONFIG_FILE
    raw = {key: _decoded(value) for key, value in read_json_object(directory, CONFIG_FILE).items()}
    native = _class_of(path, raw)
    for key in _NUMBERS_OF_LAYERS:
        if isinstance(raw.get(key), int | float) and raw[key] > num_tensors:
            raise InputError(f"{path}: {key} is {_shown(raw[key])}, but the weight files hold {num_tensors} tensors")
    class_fields = {field.name for field in dataclasses.fields(_config_class(native))}
    _refuse_unknown(path, native, raw, class_fields)
    try:
        modern = native.modernised(raw)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    # Names that the class does not know would become attributes that nothing reads.
    passed = {
        key: value
        for key, value in modern.items()
        # A former name that is null says no more than one that is not there, but not every class looks.
        if key in class_fields or (key in native.former and value is not None)
    }
    config = _build(path, native, passed)
    layers, named = raw.get("num_hidden_layers"), getattr(config, "layers_block_type", None)
    if layers is not None and named is not None and len(named) != layers:
        raise InputError(f"{path}: num_hidden_layers is {layers}, but there are types of {len(named)} layers")
    unread = sorted(key for key in raw if key in native.unread and key not in class_fields)
    notes = (f"{key}={_shown(raw[key])} is not read by {native.architecture}, and was not here" for key in unread)
    return ClassConfiguration(path, native, config, tuple(notes))


def _class_of(path: Path, raw: Mapping[str, Any]) -> NativeClass:
    """The native class that a file names, by its architecture or else by its type."""
    architectures = raw.get("architectures") or []
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    for native in NATIVE_CLASSES:
        if named == native.architecture or named is None and raw.get("model_type") == native.model_type:
            if raw.get("model_type", native.model_type) != native.model_type:
                raise InputError(
                    f"{path}: model_type is {_shown(raw['model_type'])}, but {native.architecture} is of type "
                    f"{native.model_type}"
                )
            return native
    known = ", ".join(native.architecture for native in NATIVE_CLASSES)
    found = f"model_type {_shown(raw.get('model_type'))}" if named is None else f"architecture {_shown(named)}"
    raise InputError(f"{path}: is of {found}, where one of {known} can be imported")


def _config_class(native: NativeClass) -> type[PreTrainedConfig]:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[native.model_type]


def _refuse_unknown(path: Path, native: NativeClass, raw: Mapping[str, Any], class_fields: set[str]) -> None:
    known = class_fields | native.former | native.unread | _FREE
    unknown = sorted(key for key in raw if key not in known)
    if unknown:
        shown = ", ".join(f"{key}={_shown(raw[key])}" for key in unknown)
        raise InputError(
            f"{path}: {shown}: {native.architecture} has no such field, so that nothing says what the weights need "
            f"there; where they need nothing, take it out of the file"
        )


def _build(path: Path, native: NativeClass, fields: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        config = _config_class(native)(**fields)
        # Some values fail only here.
        config.to_dict()
        return config
    except Exception as error:  # each class checks its fields in its own way
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: transformers refuses it for {native.architecture}: {reason}") from None


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """All fields of a configuration, those that a class derives where they are not given included."""
    fields = config.to_dict()
    heads = fields.get("num_attention_heads")
    if heads and fields.get("head_dim") is None:
        fields["head_dim"] = fields["hidden_size"] // heads
    return fields


def _differing(native: NativeClass, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Keys that are not the same on both sides, of those that say what is computed."""
    keys = sorted((theirs.keys() | ours.keys()) - native.unread - native.folded - _FREE)
    return [key for key in keys if not _same(key, theirs.get(key), ours.get(key))]


def _same(key: str, theirs: Any, ours: Any) -> bool:
    if key == "time_step_limit" and ours == ANY_TIME_STEP:
        # No limit, in whatever large number.
        return isinstance(theirs, list) and len(theirs) == 2 and theirs[0] <= ours[0] and theirs[1] >= ours[1]
    if key == "time_step_min":
        return theirs <= ours
    if key == "output_logit_soft_cap":
        return theirs == ours or theirs > ours >= NO_CAP
    return theirs == ours


def _shortest_pattern(names: list[str]) -> list[str]:
    """The shortest list that gives all names when it is repeated."""
    for length in range(1, len(names) + 1):
        if len(names) % length == 0 and names[:length] * (len(names) // length) == names:
            return names[:length]
    return names


def _decoded(value: Any) -> Any:
    """A value of a file as ``transformers`` reads it: numbers that JSON lacks are objects there."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in _SPECIAL_FLOATS:
            return float(value["__float__"])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
