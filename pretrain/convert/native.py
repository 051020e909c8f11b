"""What the native ``transformers`` classes have in common: whether one holds a model, its fields, its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config.model import BlockConfig, ModelConfig
from pretrain.convert.multipliers import Multipliers
from pretrain.errors import InputError
from pretrain.models.hugging_face import Piece, pieces_of_tensors, places_within
from pretrain.models.mixer_config import MixerConfig
from pretrain.models.registry import family_of

PARTS = ("mixer", "channel")

# What each layer type of a class is with us: names of a mixer and of a channel mixer.
LayerTypes = Mapping[str | None, tuple[str | None, str | None]]

# Outside of its mixers, what Llama calls its parameters, and classes that follow it.
LLAMA_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "mixer_norm.weight": "input_layernorm.weight",
    "channel_norm.weight": "post_attention_layernorm.weight",
}


def _always(fields: Mapping[str, Any]) -> bool:
    return True


def _no_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class NativeClass:
    """One class of ``transformers``, described by what it adds to the forms that the mixers declare.

    Attributes:
        model_type: by which mixers' ``hf.py`` and ``transformers`` know it.
        architecture: name of the class.
        block: prefix of a layer's tensors; ``{}`` is the layer's index.
        names: our names outside the mixers -> theirs; those of a block's norms without the prefix.
        parts: which parts a block may have, as ``(mixer, channel)``.
        norm_epsilon: the field of the norms' epsilon.
        layers: what each of its layer types is with us: names of a mixer and of a channel mixer, None where there is
            none; None is the type of a class that has only one.
        layers_of: fields -> the same, of a class whose fields decide it; None: it is ``layers`` always.
        fields: model, type of each layer by the mixers' ``LAYER_TYPES`` -> fields that mixers cannot know.
        defaults: fields that matter only where a layer sets them, in values that any model goes with.
        ties_embeddings: whether it can tie the head's weight to the embedding's.
        caps_logits: whether it can cap logits.
        masks_padding: whether padding before a sequence, where ``attention_mask`` says so, stays out of its states.
        computes_in_bfloat16: whether it can, with the kernels that it has everywhere; else files of bfloat16 are
            widened when they are loaded.
        caches_state: whether its cache can hold the state of a model with these fields.
        counts_by_attention: its cache counts tokens in an attention layer and fails where there is none
            (transformers 5.23), also without ``generate``.
        model_keys: fields -> further keys of our model section.
        multipliers: fields -> what the class multiplies by and our layers do not, which imports multiply into weights.
        folded: the fields that those are read from.
        modernised: a configuration file's fields -> those that the class of today reads, with the kernels that it has
            everywhere.
        former: names that the class itself reads though it has no such field: most are of earlier versions' files.
        cures: fields that ours has in one value only -> what to do about another.
        unread: fields that change nothing of what the class computes: starts of fresh weights, layers that it then
            does not have, names that it has never read or reads no more.
        rounding: fields that change nothing but where it rounds -> what ours does.
    """

    model_type: str
    architecture: str
    block: str
    names: Mapping[str, str]
    parts: tuple[tuple[bool, bool], ...]
    norm_epsilon: str
    layers: LayerTypes
    fields: Callable[[ModelConfig, list[str | None]], dict[str, Any]]
    layers_of: Callable[[Mapping[str, Any]], LayerTypes] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ties_embeddings: bool = True
    caps_logits: bool = False
    masks_padding: bool = True
    computes_in_bfloat16: bool = True
    caches_state: Callable[[Mapping[str, Any]], bool] = _always
    counts_by_attention: bool = False
    model_keys: Callable[[Mapping[str, Any]], dict[str, Any]] = _no_keys
    multipliers: Callable[[Mapping[str, Any]], Multipliers] = Multipliers.none
    folded: frozenset[str] = frozenset()
    modernised: Callable[[dict[str, Any]], dict[str, Any]] = dict
    former: frozenset[str] = frozenset()
    cures: Mapping[str, str] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    rounding: Mapping[str, str] = field(default_factory=dict)

    def problem(self, model: ModelConfig) -> str | None:
        """Why this class cannot hold the model, in words; None where it can."""
        problems = []
        unfit = self._unfit_layers(model)
        if unfit:
            problems.append(f"cannot hold {', '.join(unfit)}")
        if model.hierarchy is not None:
            problems.append("has no stages round its layers, as model.hierarchy asks for")
        if model.norm != "rms":
            problems.append(f"has RMS norms, not model.norm={model.norm}")
        if model.tie_embeddings and not self.ties_embeddings:
            problems.append("does not tie its embeddings")
        if model.output_logit_soft_cap is not None and not self.caps_logits:
            problems.append("does not cap its logits")
        if self.counts_by_attention and not unfit and "full_attention" not in self._layer_types(model):
            problems.append("fails without an attention layer")
        if not unfit:
            try:
                self.config_fields(model)
            except InputError as error:
                problems.append(str(error))
        return f"{self.architecture} {', '.join(problems)}" if problems else None

    def _unfit_layers(self, model: ModelConfig) -> list[str]:
        """The first layer of each kind that the class cannot hold, and how many there are."""
        unfit: defaultdict[str, list[int]] = defaultdict(list)
        for layer in range(model.num_layers):
            block = model.block(layer)
            families = [family_of(part) if part else None for part in (block.mixer, block.channel)]
            known = all(family is None or self.model_type in family.hugging_face.KEYS for family in families)
            if not known or tuple(family is not None for family in families) not in self.parts:
                mixer, channel = (family.name if family else "none" for family in families)
                unfit[f"mixer {mixer}, channel {channel}"].append(layer)
        return [
            f"layer {layers[0]} ({kind})" + (f" and {len(layers) - 1} like it" if len(layers) > 1 else "")
            for kind, layers in unfit.items()
        ]

    def config_fields(self, model: ModelConfig) -> dict[str, Any]:
        """Fields of the class's configuration.

        Raises:
            InputError: two parts of the model need different values of one field, or one of them has no like.
        """
        fields = {
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "tie_word_embeddings": model.tie_embeddings,
            self.norm_epsilon: model.norm_epsilon,
            **self.fields(model, self._layer_types(model)),
        }
        origin = dict.fromkeys(fields, "model")
        for name in sorted(set(model.layers)):
            for part, config in parts_of(model.blocks[name]):
                here = f"model.blocks.{name}.{part}"
                declared = family_of(config).hugging_face.FIELDS[self.model_type](config, model.hidden_size)
                for key, value in declared.items():
                    if fields.setdefault(key, value) != value:
                        raise InputError(
                            f"has one {key} for the whole model, but {origin[key]} needs {fields[key]} and {here} "
                            f"needs {value}"
                        )
                    origin.setdefault(key, here)
        return {**self.defaults, **fields}

    def _layer_types(self, model: ModelConfig) -> list[str | None]:
        return [self._layer_type(model.block(layer)) for layer in range(model.num_layers)]

    def _layer_type(self, block: BlockConfig) -> str | None:
        """What a layer is called in the class's list of them, by the first of its parts that says so."""
        for _, config in parts_of(block):
            types = getattr(family_of(config).hugging_face, "LAYER_TYPES", {})
            if self.model_type in types:
                return types[self.model_type]
        return None

    def places(self, model: ModelConfig) -> dict[str, str | Piece]:
        """Our global parameter names, and those that only some configurations have -> names or pieces there."""
        norms = {name: self.names[name] for name in ("mixer_norm.weight", "channel_norm.weight") if name in self.names}
        places: dict[str, str | Piece] = {name: self.names[name] for name in self.names if name not in norms}
        for layer in range(model.num_layers):
            ours, theirs = f"layers.{layer}", self.block.format(layer)
            block = model.block(layer)
            for part, config in parts_of(block):
                places[f"{ours}.{part}_norm.weight"] = f"{theirs}.{norms[f'{part}_norm.weight']}"
                for name, place in places_within(family_of(config).hugging_face, self.model_type, config).items():
                    places[f"{ours}.{part}.{name}"] = _within(theirs, place)
        return places

    def tensors(self, model: ModelConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The class's tensors, by the names that its files have, each of our parameters in exactly one place."""
        pieces = pieces_of_tensors(self.places(model), parameters)
        return {name: assemble(parameters, parts) for name, parts in pieces.items()}


def _within(prefix: str, place: str | Piece) -> str | Piece:
    if isinstance(place, str):
        return f"{prefix}.{place}"
    return replace(place, name=f"{prefix}.{place.name}")


def assemble(parameters: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> Tensor:
    """One tensor of a native class from our parameters, in the order of ``pieces``."""
    tensors = [
        parameters[name] if piece.unsqueeze is None else parameters[name].unsqueeze(piece.unsqueeze)
        for name, piece in pieces.items()
    ]
    scaled = [tensor * piece.scale for tensor, piece in zip(tensors, pieces.values(), strict=True)]
    whole = scaled[0] if len(scaled) == 1 else torch.cat(scaled)
    stack = next(iter(pieces.values())).stack
    return whole if stack is None else whole.unflatten(0, (stack, -1))


def parts_of(block: BlockConfig) -> list[tuple[str, MixerConfig]]:
    """``mixer`` and ``channel`` of a block, those that there are."""
    return [(part, getattr(block, part)) for part in PARTS if getattr(block, part) is not None]


@dataclass(frozen=True)
class NativeForm:
    """A model in the form of a native class that holds it."""

    native: NativeClass
    model: ModelConfig

    @property
    def architecture(self) -> str:
        return self.native.architecture

    @property
    def model_type(self) -> str:
        return self.native.model_type

    @property
    def needs_code(self) -> bool:
        return False

    @property
    def cached_generation(self) -> bool:
        return self.native.caches_state(self.native.config_fields(self.model))

    @property
    def masks_padding(self) -> bool:
        return self.native.masks_padding

    def loaded_dtype(self, dtype: str) -> str:
        """In what a model whose files are of ``dtype`` is loaded, unless its user says otherwise."""
        return dtype if self.native.computes_in_bfloat16 else "float32"

    def write_config(self, directory: Path, dtype: str, marks: Mapping[str, Any]) -> None:
        """Writes ``config.json``.

        Args:
            directory: where it goes.
            dtype: of the weights.
            marks: the special tokens' fields.
        """
        from transformers import CONFIG_MAPPING

        fields = {**marks, **self.native.config_fields(self.model)}
        fields |= {"architectures": [self.architecture], "dtype": self.loaded_dtype(dtype)}
        CONFIG_MAPPING[self.model_type](**fields).save_pretrained(directory)

    def pieces(self, parameters: Iterable[str]) -> dict[str, dict[str, Piece]]:
        """What the weight files hold: tensor -> our parameters that it is made of, in order."""
        return pieces_of_tensors(self.native.places(self.model), parameters)


def first_native_form(classes: Iterable[NativeClass], model: ModelConfig) -> tuple[NativeForm | None, list[str]]:
    """The model in the first class that holds it, and why each class before that does not."""
    problems = []
    for native in classes:
        problem = native.problem(model)
        if problem is None:
            return NativeForm(native, model), problems
        problems.append(problem)
    return None, problems
