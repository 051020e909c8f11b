"""Programs that run on every rank of a pool of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.batch import IGNORED_LABEL, Batch
from data.order import rank_share
from pretrain.config.schema import Config
from pretrain.models.decoder import Decoder
from pretrain.models.parameters import initialise_weights, own_slice
from pretrain.optimizer.learning_rate import learning_rate
from pretrain.parallel.build import build_engine, build_model
from pretrain.parallel.engine import Engine
from pretrain.parallel.schedule import run_schedule
from pretrain.parallel.topology import Topology, build_topology
from tests.configurations import tiny_config


def synthetic_batch(indices: list[int], sequence_length: int) -> Batch:
    """Random tokens, document starts and labels to leave out, each sample from its index alone."""
    tokens, labels, starts = [], [], []
    for index in indices:
        generator = torch.Generator().manual_seed(index)
        row = torch.randint(0, 257, (sequence_length + 1,), generator=generator)
        start = torch.rand(sequence_length, generator=generator) < 0.15
        left_out = torch.rand(sequence_length, generator=generator) < 0.2 * (index % 3)
        start[0] = True
        tokens.append(row[:-1])
        labels.append(row[1:].masked_fill(left_out, IGNORED_LABEL))
        starts.append(start)
    stacked = torch.stack(labels)
    counted = int((stacked != IGNORED_LABEL).sum())
    return Batch(torch.stack(tokens), stacked, torch.stack(starts), label_bytes=counted, label_count=counted)


def randomise(model: Decoder) -> None:
    """Moves every parameter away from its start, zeros and ones too, the same in every layout."""
    from pretrain.models.parameters import declared_parameters, full_shape, shard_of

    with torch.no_grad():
        for name, parameter in declared_parameters(model):
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            noise = 0.05 * torch.randn(full_shape(parameter), generator=generator)
            parameter.add_(shard_of(noise, parameter.spec))


def open_engine(config: Config) -> tuple[Topology, Engine]:
    """This rank's engine over a model that is the same in every layout."""
    topology = build_topology(config)
    model = build_model(config)
    initialise_weights(model, config.train.seed)
    randomise(model)
    return topology, build_engine(model, config, topology)


def one_step(config: Config, topology: Topology, engine: Engine, step: int) -> tuple[float, float, bool]:
    """Loss, gradient norm and whether the step was applied."""
    size = config.train.global_batch_size
    indices = range(step * size, (step + 1) * size)
    shares = rank_share(indices, config.train.micro_batch_size, topology.data_rank, topology.data_size)
    batches = [synthetic_batch(share, config.data.sequence_length) for share in shares]
    with engine.accumulate():
        loss = run_schedule(engine.model, engine.decoder, batches, topology.device, train=True)
    result = engine.step(learning_rate(config, step))
    return loss.nats_per_token, result.gradient_norm, result.applied


def local_weights(engine: Engine, topology: Topology) -> dict[str, tuple[np.ndarray, int | None, int]]:
    """This rank's slices: values, split dimension, tensor rank; nothing from further ranks that hold the same."""
    found = {}
    for name, parameter in engine.parameters.items():
        value = engine.read_state(name, "weight").detach().reshape(engine.shapes[name])
        dimension = parameter.spec.shard_dimension
        if dimension is not None:
            # What is left is padding, which no step may change.
            _, length = own_slice(parameter.spec, value.shape)
            assert not value.narrow(dimension, length, value.shape[dimension] - length).any(), name
            value = value.narrow(dimension, 0, length)
        copy = topology.expert_data_rank if parameter.spec.expert else topology.copy_rank
        if copy == 0:
            found[name] = (value.numpy().copy(), dimension, topology.tensor_rank)
    return found


def train_steps(overrides: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    """Trains on synthetic batches; every rank returns its losses, norms and slices of the final weights."""
    config = tiny_config(**overrides)
    torch.manual_seed(dist.get_rank())
    topology, engine = open_engine(config)
    trajectory = [one_step(config, topology, engine, step) for step in range(steps)]
    return {"trajectory": trajectory, "weights": local_weights(engine, topology)}


def assemble(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Whole tensors by global name from the slices of all ranks."""
    slices: dict[str, dict[int, tuple[np.ndarray, int | None]]] = {}
    for result in results:
        for name, (value, dimension, tensor_rank) in result["weights"].items():
            if tensor_rank in (held := slices.setdefault(name, {})):
                # A tied embedding, on the first and on the last stage.
                np.testing.assert_array_equal(value, held[tensor_rank][0], err_msg=f"copies of {name} differ")
            held[tensor_rank] = (value, dimension)
    whole = {}
    for name, parts in slices.items():
        dimension = parts[0][1]
        values = [parts[rank][0] for rank in sorted(parts)]
        whole[name] = values[0] if dimension is None else np.concatenate(values, axis=dimension)
        if dimension is None:
            for value in values[1:]:
                np.testing.assert_array_equal(value, values[0], err_msg=f"{name} differs between tensor ranks")
    return whole
