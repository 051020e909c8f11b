"""Checkpoints of tiny models with random weights, written under any split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import TensorPiece, write_checkpoint
from pretrain.config import Config
from pretrain.models.building import build_decoder
from pretrain.models.decoder import Decoder
from pretrain.models.parameters import declared_parameters
from pretrain.parallel.topology import build_topology, megatron_config
from tests.configurations import TINY_MODEL, tiny_config


def model_section(mixer: dict[str, Any] | None = None, channel: dict[str, Any] | None = None, **keys: Any) -> dict:
    """The tiny model of two layers, with other keys of the model and of its one block."""
    tiny = TINY_MODEL["blocks"]["mlstm"]
    block = {"mixer": tiny["mixer"] | (mixer or {}), "channel": tiny["channel"] | (channel or {})}
    return {**TINY_MODEL, "num_layers": 2, "blocks": {"mlstm": block}, **keys}


def random_decoder(config: Config, seed: int = 0) -> Decoder:
    """A whole model in which every parameter is random: also norms, biases, and what would start at zero.

    Embeddings are larger than what the blocks add to them, so that layers amplify rounding little.
    """
    build_topology(config)
    decoder = build_decoder(config.model, megatron_config(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in declared_parameters(decoder):
            values = torch.randn(parameter.shape, generator=generator)
            if name == "embedding.weight" and not config.model.tie_embeddings:
                values *= 2
            elif parameter.dim() > 1:
                values *= math.prod(parameter.shape[1:]) ** -0.5
            elif "norm" in name:
                values = 1 + 0.3 * values
            parameter.copy_(values)
    return decoder.eval().requires_grad_(False)


def pieces_of(decoder: Decoder, ranks: int = 1) -> Iterator[TensorPiece]:
    """The weights as that many tensor-parallel ranks would write them."""
    for name, parameter in declared_parameters(decoder):
        dimension = parameter.spec.shard_dimension
        if ranks == 1 or dimension is None:
            yield TensorPiece(name, "weight", parameter, tuple(parameter.shape))
            continue
        offset = 0
        for part in parameter.chunk(ranks, dimension):
            piece = part.contiguous()
            yield TensorPiece(name, "weight", piece, tuple(parameter.shape), dimension, offset)
            offset += part.shape[dimension]


def write_run(directory: Path, model: dict[str, Any] | None = None, **sections: Any) -> tuple[Path, Decoder]:
    """A run directory with one checkpoint of step 7, and the model in it."""
    config = tiny_config(str(directory), model=model or model_section(), **sections)
    decoder = random_decoder(config)
    write_checkpoint(directory / "checkpoints", 7, pieces_of(decoder), {"config": config.model_dump(mode="json")})
    return directory, decoder


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    """Ids of the byte tokenizer, the boundary mark among them."""
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(seed))
