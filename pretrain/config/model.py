"""The section ``model``: blocks, in which order, and what is round them. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pretrain.models.mixer_config import OuterBlock, StrictModel
from pretrain.models.registry import channel_mixers, config_union, hierarchies, sequence_mixers

SequenceMixerConfig: Any = config_union(sequence_mixers())
ChannelMixerConfig: Any = config_union(channel_mixers())
AnyHierarchyConfig: Any = config_union(hierarchies())


class BlockConfig(StrictModel):
    """One residual block: ``x + mixer(norm(x))``, then ``x + channel(norm(x))``; either may be left out."""

    mixer: SequenceMixerConfig | None = Field(None, description="what mixes along the sequence")
    channel: ChannelMixerConfig | None = Field(None, description="what mixes the channels of each position")

    @model_validator(mode="after")
    def _holds_something(self) -> BlockConfig:
        if self.mixer is None and self.channel is None:
            raise ValueError("a block needs a mixer, a channel mixer, or both; this one has neither")
        return self


class ModelConfig(StrictModel):
    """A decoder: embedding, blocks, norm, head; with a hierarchy, stages that read bytes round the blocks."""

    vocab_size: int = Field(
        ge=2,
        description="rows of the embedding; at least the tokenizer's vocabulary. Where it does not divide over "
        "tensor-parallel ranks, they pad it by themselves",
    )
    hidden_size: int = Field(ge=1, description="width of the residual stream")
    num_layers: int = Field(ge=1, description="number of blocks")
    layers: list[str] = Field(
        min_length=1, description="names of blocks, one per layer; a shorter list is a pattern that repeats"
    )
    blocks: dict[str, BlockConfig] = Field(min_length=1, description="the blocks that `layers` names")
    norm: Literal["rms", "layer"] = Field("rms", description="norm before each mixer and before the head; no biases")
    norm_epsilon: float = Field(1e-6, gt=0, description="epsilon of the norms")
    tie_embeddings: bool = Field(False, description="the head's weight is the embedding's")
    output_logit_soft_cap: float | None = Field(
        None, gt=0, description="logits are capped to +-this by c*tanh(x/c); null leaves them as they are"
    )

    hierarchy: AnyHierarchyConfig | None = Field(
        None, description="stages round the layers above, which then see chunks instead of bytes; null: none"
    )

    @model_validator(mode="after")
    def _layers_name_blocks(self) -> ModelConfig:
        for used in self.used_blocks():
            if used.name not in self.blocks:
                raise ValueError(
                    f"{used.place} names the block '{used.name}', but blocks has only {sorted(self.blocks)}"
                )
        if self.num_layers % len(self.layers):
            raise ValueError(
                f"the pattern of {len(self.layers)} layers does not repeat a whole number of times in "
                f"num_layers={self.num_layers}; change num_layers or the length of layers"
            )
        problem = self.hierarchy.problem(self.hidden_size) if self.hierarchy is not None else None
        if problem:
            raise ValueError(f"hierarchy: {problem}")
        problem = self.block_problem(1)
        if problem:
            raise ValueError(problem)
        return self

    def used_blocks(self) -> list[OuterBlock]:
        """Every block that the model has: those of its layers (one entry per name of the pattern), and outer ones."""
        used = [OuterBlock("layers", name, self.hidden_size) for name in self.layers]
        return used + (self.hierarchy.outer_blocks() if self.hierarchy is not None else [])

    def block_problem(self, tensor_parallel: int) -> str | None:
        """Why a block cannot have the width at which it is used, or be split so; None where all can."""
        for name, hidden_size in sorted({(used.name, used.hidden_size) for used in self.used_blocks()}):
            for part in ("mixer", "channel"):
                section = getattr(self.blocks[name], part)
                problem = section.problem(hidden_size, tensor_parallel) if section else None
                if problem:
                    return f"blocks.{name}.{part}: {problem}"
        return None

    @property
    def embedding_size(self) -> int:
        """Width of the embedding and of the head."""
        return self.hidden_size if self.hierarchy is None else self.hierarchy.embedding_size

    @property
    def reads_word_starts(self) -> bool:
        """Whether the model is told where words start."""
        return self.hierarchy is not None and self.hierarchy.reads_word_starts

    @model_validator(mode="after")
    def _layers_agree_on_what_they_carry(self) -> ModelConfig:
        seen: dict[tuple[str, str], tuple[str, int]] = {}
        for used in self.used_blocks():
            channel = self.blocks[used.name].channel
            for tensor, size in (channel.carried(used.hidden_size) if channel else {}).items():
                first, other = seen.setdefault((used.place, tensor), (used.name, size))
                if other != size:
                    raise ValueError(
                        f"blocks of {used.place} carry one {tensor} from each to the next, but blocks.{first}.channel "
                        f"gives it {other} channels and blocks.{used.name}.channel {size}; give both the same size"
                    )
        return self

    def block(self, layer: int) -> BlockConfig:
        """The block of a layer, counted from 0 over the whole model."""
        return self.blocks[self.layers[layer % len(self.layers)]]

    def blocks_in_use(self) -> list[BlockConfig]:
        """The blocks that ``layers`` names, each once, in order."""
        return [self.blocks[name] for name in dict.fromkeys(self.layers)]

    def mixers_that_wait(self) -> list[str]:
        """Types of sequence mixers that can only wait for the state before their segment, each once."""
        mixers = [block.mixer for block in self.blocks_in_use() if block.mixer is not None]
        return list(dict.fromkeys(mixer.type for mixer in mixers if not mixer.exchanges_segments))

    def carried_channels(self, place: str = "layers") -> dict[str, int]:
        """What layers of a network (see ``OuterBlock.place``) carry: float32 channels per position, by name."""
        network = [used for used in self.used_blocks() if used.place == place]
        channels = [(self.blocks[used.name].channel, used.hidden_size) for used in network]
        return dict(sorted(item for channel, size in channels if channel for item in channel.carried(size).items()))
