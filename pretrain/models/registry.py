"""What is registered: every folder here that holds a ``config.py`` with a ``CONFIG`` is one mixer.

A mixer is one folder with

* ``config.py``: ``CONFIG``, a subclass of :class:`MixerConfig` (no torch);
* ``cost.py``: parameters, FLOPs and bytes from the config alone (no torch), see :class:`MixerCost`; also
  ``segment_messages`` where the configuration says ``exchanges_segments``, and ``tensor_messages`` where
  tensor-parallel ranks say more than :func:`pretrain.models.tensor_messages.split_projections` does;
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
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar

import pydantic

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
class MixerCost:
    """What a mixer costs, from its configuration alone.

    FLOPs count matrix products, a multiply-add as two, so that they can be compared with torch's
    ``FlopCounterMode``; what a scan does elementwise, which that counter cannot see, stands apart. Bytes are for
    one rank that holds the whole mixer; they split evenly over tensor-parallel ranks unless it is said otherwise.

    Attributes:
        parameters: number of trainable parameters, all tensor-parallel ranks together.
        parameters_replicated: how many of those every tensor-parallel rank holds in full.
        parameters_grouped: how many of those belong to groups that several heads share (keys of grouped queries):
            split over the ranks where their number divides ``parameter_groups``, else whole on each.
        parameter_groups: number of those groups.
        active_parameters: how many of those one token uses (fewer than ``parameters`` for routed experts).
        projection_flops_per_token: products of one token with weights, forward; the backward pass does twice
            as many.
        scan_flops_per_token: useful work along the sequence, forward, at the sequence length asked for:
            only pairs of tokens that may see each other count. The backward pass counts twice as much.
        executed_scan_flops_per_token: what the torch kernel really multiplies for that, forward, padding and
            masked pairs included.
        executed_scan_backward_flops_per_token: likewise backward, what the kernel computes again included.
        state_bytes: recurrent state of one sequence; for attention after ``sequence_length`` tokens.
        activation_bytes_per_token: kept for the backward pass per token when nothing is recomputed, on a GPU;
            the mixer's input is the block's to count.
        working_bytes_per_token: held per token only while this mixer's backward pass runs.
        elementwise_scan_flops_per_token: useful elementwise work along the sequence, forward: cells of nonlinear
            recurrences, depthwise convolutions. One evaluation of each counts, not an iterative solver's
            repetitions. The backward pass counts twice as much.
        parameters_routed: how many of the parameters belong to routed experts, which expert-parallel ranks split.
        shared_parameters: parameters of modules that all such layers of a network share, by the modules' names; the
            network has them once, each pipeline stage a copy, and ``parameters`` leaves them out.
        activation_bytes_replicated: those of ``activation_bytes_per_token`` that every tensor-parallel rank keeps.
        activation_bytes_by_position: those that belong to positions: every tensor-parallel rank keeps them, unless
            sequence parallelism gives each its part of the sequence.
        working_bytes_replicated: those of ``working_bytes_per_token`` that every tensor-parallel rank holds.
        parameters_partial: those of ``parameters_replicated`` of whose gradients ranks have parts in any layout.
    """

    parameters: int
    parameters_replicated: int
    active_parameters: int
    projection_flops_per_token: float
    scan_flops_per_token: float
    executed_scan_flops_per_token: float
    executed_scan_backward_flops_per_token: float
    state_bytes: int
    activation_bytes_per_token: float
    working_bytes_per_token: float
    elementwise_scan_flops_per_token: float = 0.0
    parameters_grouped: int = 0
    parameter_groups: int = 1
    parameters_routed: int = 0
    shared_parameters: typing.Mapping[str, int] = field(default_factory=dict)
    activation_bytes_replicated: float = 0.0
    activation_bytes_by_position: float = 0.0
    working_bytes_replicated: float = 0.0
    parameters_partial: int = 0

    def parameters_per_rank(self, tensor: int, expert: int = 1) -> int:
        """Parameters on one of ``tensor`` tensor-parallel and ``expert`` expert-parallel ranks."""
        whole = self.parameters_replicated
        if self.parameter_groups % tensor:
            whole += self.parameters_grouped
        routed = self.routed_per_rank(tensor, expert)
        return (self.parameters - self.parameters_routed - whole) // tensor + whole + routed

    def routed_per_rank(self, tensor: int, expert: int) -> int:
        """Those of :meth:`parameters_per_rank` that belong to routed experts."""
        return self.parameters_routed // (tensor * expert)

    def activation_bytes_per_rank(self, tensor: int, sequence_parallel: bool) -> float:
        """``activation_bytes_per_token`` on one of ``tensor`` tensor-parallel ranks."""
        whole, positions = self.activation_bytes_replicated, self.activation_bytes_by_position
        positions_here = positions / (tensor if sequence_parallel else 1)
        return whole + positions_here + (self.activation_bytes_per_token - whole - positions) / tensor

    def working_bytes_per_rank(self, tensor: int) -> float:
        """``working_bytes_per_token`` on one of ``tensor`` tensor-parallel ranks."""
        whole = self.working_bytes_replicated
        return whole + (self.working_bytes_per_token - whole) / tensor

    @property
    def flops_per_token(self) -> float:
        """Useful FLOPs of one forward pass per token."""
        return self.projection_flops_per_token + self.scan_flops_per_token + self.elementwise_scan_flops_per_token


@dataclass(frozen=True)
class OuterCost:
    """What one block of a hierarchy's outer stages costs, or what joins a stage with that further in.

    Attributes:
        hidden_size: its width.
        positions_per_token: how many positions it is expected to have for each token that is read.
        block: the block's name in ``model.blocks``; None for a joint.
        place: of a block, the network that it belongs to, as :class:`OuterBlock` has it.
        joint: the cost of a joint, per position.
        norms: how many norms of this width a joint has; a block's are known.
    """

    hidden_size: int
    positions_per_token: float
    block: str | None = None
    place: str = ""
    joint: MixerCost | None = None
    norms: int = 0


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
