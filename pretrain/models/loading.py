"""Weights of a checkpoint into a model: whole in one process, or each rank's slice under any layout."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state

from pretrain.checkpoint import CheckpointReader, resolve_checkpoint
from pretrain.config import Config, parse_config
from pretrain.errors import InputError
from pretrain.models.building import build_decoder
from pretrain.models.decoder import Decoder
from pretrain.models.parameters import declared_parameters, full_shape, own_slice, padded_to
from pretrain.parallel.topology import Topology, build_topology, megatron_config


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, whole in this process.

    Attributes:
        decoder: in evaluation mode, its weights without gradients.
        config: of its run, but laid out for one process and computing in float32.
        step: optimizer steps that it was trained for.
        checkpoint: the directory that it was read from.
        topology: where this process stands: alone.
    """

    decoder: Decoder
    config: Config
    step: int
    checkpoint: Path
    topology: Topology


def load_decoder(path: Path, device: str = "cpu") -> LoadedModel:
    """Reads a model whole into this process, whatever layout it was trained with.

    Builds the process groups of one process and drops those of another layout, so it is not for use inside a
    training process.

    Args:
        path: a run directory (its newest complete checkpoint is meant) or one checkpoint.
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        InputError: there is no complete checkpoint, or its weights are not those of its configuration.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, but is {device!r}")
    checkpoint = resolve_checkpoint(Path(path))
    with CheckpointReader(checkpoint) as reader:
        origin = f"configuration in {reader.path}"
        config = for_one_process(stored_configuration(reader), origin, device)
        topology = build_topology(config)
        decoder = build_decoder(config.model, megatron_config(config))
        read_weights(decoder, reader)
        decoder = decoder.to(topology.device).eval().requires_grad_(False)
        return LoadedModel(decoder, config, reader.step, checkpoint, topology)


def stored_configuration(reader: CheckpointReader) -> Config:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        InputError: it holds none, or one of another schema.
    """
    raw = reader.state.get("config")
    if not isinstance(raw, dict):
        raise InputError(f"{reader.path}: its state holds no run configuration under 'config'")
    return parse_config(raw, f"configuration in {reader.path}")


def for_one_process(config: Config, origin: str, device: str = "cpu") -> Config:
    """The same run, laid out for one process and computing in float32; ``origin`` names it in messages."""
    raw = config.model_dump(mode="json")
    raw["parallel"] = {"tensor": 1, "pipeline": 1, "sequence": False, "zero": 0}
    raw["train"] |= {"device": device, "precision": "float32", "recompute": "none"}
    return parse_config(raw, origin)


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of a model that one process holds, by global name; allocates none of them.

    Builds the process groups of one process and drops those of another layout.
    """
    build_topology(config)
    with torch.device("meta"):
        decoder = build_decoder(config.model, megatron_config(config))
    return {name: full_shape(parameter) for name, parameter in declared_parameters(decoder)}


@torch.no_grad()
def read_weights(model: Decoder, reader: CheckpointReader) -> None:
    """Copies into each parameter this rank's own slice of the tensor of its global name.

    Works under any tensor- and pipeline-parallel layout, before an optimizer engine splits the parameters
    further; only the bytes that this rank holds are read.

    Raises:
        InputError: the checkpoint lacks a tensor, has one of another shape, or (where this rank holds the
            whole depth of the model) has one that the model does not know.
    """
    parameters = dict(declared_parameters(model))
    shapes = {name: full_shape(parameter) for name, parameter in parameters.items()}
    check_tensors(reader, shapes, model.model.num_layers)
    for name, parameter in parameters.items():
        dimension = parameter.spec.shard_dimension
        if dimension is None:
            parameter.copy_(reader.read(name))
            continue
        offset, length = own_slice(parameter.spec, parameter.shape)
        part = reader.read(name, dimension=dimension, offset=offset, length=length)
        parameter.copy_(padded_to(part, parameter.spec, parameter.shape))


def check_tensors(reader: CheckpointReader, shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> None:
    """Compares names and shapes of a checkpoint's weights with those that this rank holds; reads none of them.

    Raises:
        InputError: as :func:`read_weights` does.
    """
    _check_names(reader, set(shapes), set(reader.names("weight")), num_layers)
    for name, expected in shapes.items():
        found = reader.shape(name)
        if expected != found:
            raise InputError(
                f"{reader.path} is a checkpoint from another model: {name!r} has shape {list(found)} there, but "
                f"{list(expected)} in this configuration"
            )


def _layer(name: str) -> int:
    """Index of the layer that a parameter belongs to; -1 for those outside the layers."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else -1


def _check_names(reader: CheckpointReader, expected: set[str], stored: set[str], num_layers: int) -> None:
    missing = sorted(expected - stored)
    # A pipeline stage knows only its own parameters; other layers of the model belong to other stages.
    whole = parallel_state.get_pipeline_model_parallel_world_size() == 1
    # Nor does a rank know the experts of others.
    whole = whole and parallel_state.get_expert_model_parallel_world_size() == 1
    extra = sorted(name for name in stored - expected if whole or _layer(name) >= num_layers)
    if missing:
        near = difflib.get_close_matches(missing[0], extra or sorted(stored), n=1)
        hint = f"; the nearest name there is {near[0]!r}" if near else ""
        raise InputError(
            f"{reader.path} is a checkpoint from another model: it lacks {len(missing)} tensors that this "
            f"configuration has, first {missing[0]!r}{hint}"
        )
    if extra:
        raise InputError(
            f"{reader.path} is a checkpoint from another model: it has {len(extra)} tensors that this "
            f"configuration lacks, first {extra[0]!r}"
        )
