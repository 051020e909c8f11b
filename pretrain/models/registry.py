"""What is registered: every folder here that holds a ``config.py`` with a ``CONFIG`` is one mixer.

A mixer is one folder with

* ``config.py``: ``CONFIG``, a subclass of :class:`MixerConfig` (no torch);
* ``cost.py``: parameters, FLOPs and bytes from the config alone (no torch), see :class:`MixerCost`; also
  ``segment_messages`` where the configuration says ``exchanges_segments``, ``kept_beside_messages`` where ranks with
  segments keep more than these say, and ``tensor_messages`` where tensor-parallel ranks say more than
  :func:`pretrain.models.tensor_messages.split_projections` does;
* ``mixer.py``: ``MIXER``, the module class, a subclass of :class:`pretrain.models.mixer.SequenceMixer` or
  :class:`pretrain.models.mixer.ChannelMixer`;
* ``hf.py``: how its parameters are named in the Hugging Face form.
* ``from_attention.py``, where there is one: how a layer of it takes the place of an attention layer, see
  :attr:`MixerFamily.from_attention`.

Adding a folder registers it; nothing else names it. This module imports no torch, so that a login node can
read and check configurations.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar

import pydantic

from pretrain.models.mixer_cost import MixerCost, OuterCost
from pretrain.models.segment_messages import SegmentMessage
from pretrain.models.tensor_messages import TensorMessage, split_projections

ROOT = Path(__file__).parent

# The carried tensor (see MixerConfig.carried) that layers add their own losses to, one value per token in nats; the
# model's loss is the mean over the labels that count of cross-entropy and of this.
AUXILIARY_LOSS = "auxiliary_loss"

# What is handed on beside carried tensors where a row holds several sequences one after the other, as chunks stand in
# a hierarchy: ``(sequences,)`` int64, how many positions each has. Losses that are of whole sequences need it.
SEQUENCE_LENGTHS = "sequence_lengths"


class StrictModel(pydantic.BaseModel):
    """Base of every configuration section: unknown keys are refused and values are not changed later."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _numbers_are_not_booleans(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        # Python, and so pydantic, would read true as 1.
        annotation = cls.model_fields[str(info.field_name)].annotation
        allowed = {annotation, *typing.get_args(annotation)}
        if isinstance(value, bool) and bool not in allowed and allowed & {int, float}:
            raise ValueError(f"must be a number, but is {str(value).lower()}")
        return value


class MixerConfig(StrictModel):
    """Base of a mixer's configuration; subclasses add ``type: Literal[name]`` and their fields.

    Attributes:
        exchanges_segments: whether ranks that hold segments of the same sequences can all run this mixer at once, each
            asking the others for the state before its own; else each waits for the state of the one before.
    """

    exchanges_segments: ClassVar[bool] = False

    def problem(self, hidden_size: int, tensor_parallel: int) -> str | None:
        """One sentence about why this mixer cannot have this width or be split over this many ranks.

        Returns:
            None where it can.
        """
        return None

    def carried(self, hidden_size: int) -> dict[str, int]:
        """What flows from layer to layer beside the hidden states: name -> float32 channels per token.

        The first layer that reads a name finds zeros; layers without it pass it on. Layers that give the same name mean
        the same tensor, and must agree on its size. Only a channel mixer may carry anything. In a hierarchy each
        network, those over bytes and those over chunks, begins with zeros of its own.
        """
        return {}

    def routed_experts(self) -> int:
        """How many experts expert parallelism splits over ranks; 0: this mixer has none."""
        return 0

    def shortest_segment(self) -> int:
        """Fewest tokens of a segment with which this mixer exchanges what is before it."""
        return 1

    @classmethod
    def examples(cls, hidden_size: int) -> list[MixerConfig]:
        """Small configurations of this mixer for ``hidden_size``, for the conformance tests."""
        raise NotImplementedError(f"{cls.__name__} must list small examples for the conformance tests")


@dataclass(frozen=True)
class OuterBlock:
    """A block that a hierarchy puts round the innermost network.

    Attributes:
        place: key below ``model`` that names it. Blocks of one place are one network: what layers carry flows through
            them in order, and what layers share is theirs alone.
        name: of the block in ``model.blocks``.
        hidden_size: width that it works at.
    """

    place: str
    name: str
    hidden_size: int


class HierarchyConfig(StrictModel):
    """Base of a hierarchy's configuration; subclasses add ``type: Literal[name]`` and their fields."""

    @property
    def embedding_size(self) -> int:
        """Width of the embedding and of the head: that of the outermost stage."""
        raise NotImplementedError(f"{type(self).__name__} must say how wide its outermost stage is")

    @property
    def inner_positions_per_token(self) -> float:
        """How many positions the innermost network is expected to have for each token that is read."""
        raise NotImplementedError(f"{type(self).__name__} must say how many positions its innermost network has")

    @property
    def reads_word_starts(self) -> bool:
        """Whether it must be told where words start, so that the data's tokenizer must know them."""
        return False

    def measured(self, metrics: Mapping[str, float]) -> HierarchyConfig:
        """This configuration with what it expects replaced by what the figures of a step say."""
        return self

    def outer_blocks(self) -> list[OuterBlock]:
        """The blocks of all outer stages."""
        raise NotImplementedError(f"{type(self).__name__} must list the blocks of its outer stages")

    def problem(self, hidden_size: int) -> str | None:
        """One sentence about why this hierarchy cannot stand round a network of this width; None where it can."""
        return None

    def tensor_problem(self, tensor: int) -> str | None:
        """One sentence about why its joints cannot be split over this many ranks; None where they can."""
        return None

    def layout_problem(self, pipeline: int, sequence_parallel: bool) -> str | None:
        """One sentence about why this hierarchy cannot be split so; None where it can."""
        return None

    def metric_reductions(self) -> dict[str, str]:
        """Figures that it reports with every step: name -> how ranks combine them, ``max`` or ``sum``."""
        return {}


@dataclass(frozen=True)
class MixerFamily:
    """One registered mixer: its name, its kind, and its modules, each imported when first asked for."""

    name: str
    kind: str
    package: str

    @functools.cached_property
    def config(self) -> type[MixerConfig]:
        return importlib.import_module(f"{self.package}.config").CONFIG

    @functools.cached_property
    def module(self) -> Any:
        """The ``torch.nn.Module`` class. Imports torch."""
        return importlib.import_module(f"{self.package}.mixer").MIXER

    @functools.cached_property
    def cost(self) -> typing.Callable[..., MixerCost]:
        """``cost(config, hidden_size, sequence_length, bytes_per_element, num_layers) -> MixerCost``."""
        return importlib.import_module(f"{self.package}.cost").cost

    @functools.cached_property
    def segment_messages(self) -> typing.Callable[..., list[SegmentMessage]]:
        """``segment_messages(config, hidden_size, segment_length, bytes_per_element)`` of one that exchanges them."""
        return importlib.import_module(f"{self.package}.cost").segment_messages

    @functools.cached_property
    def kept_beside_messages(self) -> typing.Callable[..., float]:
        """``kept_beside_messages(config, hidden_size, segment_length, ranks, bytes_per_element)``, of one sequence."""
        return getattr(importlib.import_module(f"{self.package}.cost"), "kept_beside_messages", lambda *_: 0.0)

    @functools.cached_property
    def tensor_messages(self) -> typing.Callable[..., list[TensorMessage]]:
        """``tensor_messages(config, hidden_size, bytes_per_element, tensor, sequence)``, in order of the calls."""
        return getattr(importlib.import_module(f"{self.package}.cost"), "tensor_messages", split_projections)

    @functools.cached_property
    def hugging_face(self) -> ModuleType:
        return importlib.import_module(f"{self.package}.hf")

    @functools.cached_property
    def from_attention(self) -> ModuleType | None:
        """How a layer of this mixer is made from one of attention; None where nothing says so. Imports torch.

        * ``section(attention, hidden_size)``: the section of our configuration of a layer with the same heads, or
          :class:`pretrain.errors.InputError` where no layer of this mixer can stand for such attention.
        * ``weights(attention, config, hidden_size, source)``: all parameters of that layer, by name within the mixer,
          from those of the attention layer; both whole and float32.
        """
        if importlib.util.find_spec(f"{self.package}.from_attention") is None:
            return None
        return importlib.import_module(f"{self.package}.from_attention")


@dataclass(frozen=True)
class HierarchyFamily:
    """One registered hierarchy: its name, and its modules, each imported when first asked for."""

    name: str
    package: str
    kind: str = "hierarchy"

    @functools.cached_property
    def config(self) -> type[HierarchyConfig]:
        return importlib.import_module(f"{self.package}.config").CONFIG

    @functools.cached_property
    def model(self) -> Any:
        """The class of the whole model, a subclass of ``pretrain.models.decoder.Decoder``. Imports torch."""
        return importlib.import_module(f"{self.package}.model").MODEL

    @functools.cached_property
    def outer_costs(self) -> typing.Callable[..., list[OuterCost]]:
        """``outer_costs(config, hidden_size, bytes_per_element) -> list[OuterCost]``."""
        return importlib.import_module(f"{self.package}.cost").outer_costs


def _discover(kind: str, directory: Path, package: str) -> dict[str, MixerFamily]:
    families = {}
    for folder in sorted(directory.iterdir()):
        if (folder / "config.py").is_file():
            families[folder.name] = MixerFamily(folder.name, kind, f"{package}.{folder.name}")
    return families


@functools.cache
def sequence_mixers() -> dict[str, MixerFamily]:
    """Every registered sequence mixer, by the name that a configuration's ``type`` gives."""
    return _discover("sequence", ROOT, "pretrain.models")


@functools.cache
def channel_mixers() -> dict[str, MixerFamily]:
    """Every registered channel mixer, by the name that a configuration's ``type`` gives."""
    return _discover("channel", ROOT / "channel", "pretrain.models.channel")


@functools.cache
def hierarchies() -> dict[str, HierarchyFamily]:
    """Every registered hierarchy (folders of ``hierarchy/``), by the name that a configuration's ``type`` gives."""
    directory = ROOT / "hierarchy"
    folders = [folder for folder in sorted(directory.iterdir()) if (folder / "config.py").is_file()]
    return {folder.name: HierarchyFamily(folder.name, f"pretrain.models.hierarchy.{folder.name}") for folder in folders}


def hierarchy_of(config: HierarchyConfig) -> HierarchyFamily:
    """The registered hierarchy that a configuration belongs to."""
    for family in hierarchies().values():
        if family.config is type(config):
            return family
    raise KeyError(f"{type(config).__name__} is not the configuration of a registered hierarchy")


def family_of(config: MixerConfig) -> MixerFamily:
    """The registered family that a mixer's configuration belongs to."""
    for family in (*sequence_mixers().values(), *channel_mixers().values()):
        if family.config is type(config):
            return family
    raise KeyError(f"{type(config).__name__} is not the configuration of a registered mixer")


def _type_of(section: Any) -> Any:
    return section.get("type") if isinstance(section, dict) else getattr(section, "type", None)


def config_union(families: Mapping[str, MixerFamily | HierarchyFamily]) -> Any:
    """The type that pydantic checks a mixer's section against: the one whose ``type`` is named in it."""
    configs = tuple(family.config for family in families.values())
    if len(configs) == 1:
        return configs[0]
    # Pydantic's discriminator by field name takes no model with a validator over that field, as all of ours have.
    tagged = tuple(Annotated[family.config, pydantic.Tag(name)] for name, family in families.items())
    return Annotated[typing.Union[tagged], pydantic.Discriminator(_type_of)]  # noqa: UP007 (built at run time)
