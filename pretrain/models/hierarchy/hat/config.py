"""Configuration of the hierarchical autoregressive transformer (HAT). Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from pretrain.models.mixer_config import HierarchyConfig, OuterBlock


class HATConfig(HierarchyConfig):
    """Words between bytes (Neitemeier et al. 2025, arXiv 2501.10322), in the form of the released models.

    ``model.layers`` are the backbone, which sees one vector a word. Words are those of the data's tokenizer.
    """

    type: Literal["hat"] = "hat"
    hidden_size: int = Field(ge=1, description="width of encoder and decoder, which read bytes")
    encoder: list[str] = Field(min_length=1, description="names of the encoder's blocks in model.blocks, in order")
    decoder: list[str] = Field(min_length=1, description="names of the decoder's blocks in model.blocks, in order")
    num_heads: int = Field(ge=1, description="heads with which a word's vector is pooled from its bytes")
    read_words: Literal["every", "first"] = Field(
        "every", description="before which of the decoder's blocks bytes read what the backbone knows"
    )
    bytes_per_word: float = Field(
        4.9, gt=1, description="expected bytes a word (4.9 of English text); a plan reckons with it"
    )

    @property
    def embedding_size(self) -> int:
        return self.hidden_size

    @property
    def inner_positions_per_token(self) -> float:
        return 1.0 / self.bytes_per_word

    @property
    def reads_word_starts(self) -> bool:
        return True

    def measured(self, metrics: Mapping[str, float]) -> HATConfig:
        return self.model_copy(update={"bytes_per_word": metrics["bytes_per_word"]})

    def outer_blocks(self) -> list[OuterBlock]:
        return [
            OuterBlock(f"hierarchy.{part}", name, self.hidden_size)
            for part in ("encoder", "decoder")
            for name in getattr(self, part)
        ]

    def problem(self, hidden_size: int) -> str | None:
        if self.hidden_size % self.num_heads:
            return f"num_heads={self.num_heads} does not divide hierarchy.hidden_size={self.hidden_size}; change either"
        return None

    def tensor_problem(self, tensor: int) -> str | None:
        if self.num_heads % tensor:
            return f"num_heads={self.num_heads} is not divisible by parallel.tensor={tensor}; change either"
        return None

    def layout_problem(self, pipeline: int, sequence_parallel: bool) -> str | None:
        if pipeline > 1:
            return (
                f"type hat does not go with parallel.pipeline={pipeline}: every micro-batch has another number of "
                f"words, while pipeline stages exchange tensors of one fixed length; use parallel.pipeline=1 with "
                f"tensor parallelism and ZeRO"
            )
        if sequence_parallel:
            return (
                "type hat does not go with parallel.sequence=true: words do not divide evenly over ranks; use "
                "parallel.sequence=false"
            )
        return None

    def metric_reductions(self) -> dict[str, str]:
        """``bytes_per_word``: bytes (boundary marks included, each a word) over words of the global batch."""
        return {"bytes_per_word": "max"}


CONFIG = HATConfig
