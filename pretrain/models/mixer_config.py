"""Bases of the configurations that mixers and hierarchies declare. Imports no torch."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic

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
