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
from typing import Annotated, Any

import pydantic

from pretrain.models.mixer_config import HierarchyConfig, MixerConfig
from pretrain.models.mixer_cost import MixerCost, OuterCost
from pretrain.models.segment_messages import SegmentMessage
from pretrain.models.tensor_messages import TensorMessage, split_projections

ROOT = Path(__file__).parent


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
