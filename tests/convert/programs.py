"""What the processes of a pool run in these tests."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pretrain.checkpoint import CheckpointReader, resolve_checkpoint
from pretrain.models.building import build_decoder
from pretrain.models.loading import read_weights
from pretrain.models.parameters import declared_parameters
from pretrain.parallel.topology import build_topology, megatron_config
from tests.configurations import tiny_config
from tests.convert.checkpoints import model_section


def read_slices(run: str, parallel: dict) -> dict[str, tuple[Tensor, int | None]]:
    """This rank's parameters as read from the run's checkpoint, with the dimension that is split."""
    config = tiny_config(model=model_section(), parallel=parallel)
    build_topology(config)
    model = build_decoder(config.model, megatron_config(config))
    with CheckpointReader(resolve_checkpoint(Path(run))) as reader:
        read_weights(model, reader)
    return {
        name: (parameter.detach().clone(), parameter.spec.shard_dimension)
        for name, parameter in declared_parameters(model)
    }
