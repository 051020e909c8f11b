"""Recurrent states that go on from step to step, as checkpoints hold them: by layer, name and row of the global batch.

Each is one tensor of kind ``state``, ``layers.LAYER.mixer.NAME``, whose first dimension is the global batch.
Data-parallel ranks write their own rows; of those, tensor-parallel ranks write whole tensors in turn, so that no rank
gathers more than its rows of one tensor at a time, and any other layout finds what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.shards import TensorPiece
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.models.decoder import Decoder
from pretrain.models.mixer import SequenceMixer, StateTensor
from pretrain.models.states_between_steps import States
from pretrain.parallel.topology import Topology

KIND = "state"


def _declared(decoder: Decoder) -> Iterator[tuple[str, str, StateTensor]]:
    """Layer, name and declaration of each tensor of this stage's states, in one order on all of its ranks."""
    for layer, block in decoder.layers.items():
        if isinstance(block.mixer, SequenceMixer):
            for name, tensor in block.mixer.state_tensors().items():
                yield layer, name, tensor


def _global_name(layer: str, name: str) -> str:
    return f"layers.{layer}.mixer.{name}"


def state_pieces(decoder: Decoder, topology: Topology) -> Iterator[TensorPiece]:
    """This rank's part of the states that rows go on with; nothing where none do, or before the first step.

    Collective over the tensor-parallel group.
    """
    states = None if decoder.between_steps is None else decoder.between_steps.states
    if states is None:
        return
    for place, (layer, name, declared) in enumerate(_declared(decoder)):
        rows = torch.cat([of_batch[layer][name] for of_batch in states])
        writer = place % topology.tensor_size
        if declared.shard_dimension is not None and topology.tensor_size > 1:
            parts = [torch.empty_like(rows) for _ in range(topology.tensor_size)]
            writes = topology.tensor_rank == writer
            group = parallel_state.get_tensor_model_parallel_group()
            dist.gather(rows, parts if writes else None, group=group, group_dst=writer)
            rows = torch.cat(parts, dim=1 + declared.shard_dimension) if writes else rows
        if topology.tensor_rank == writer:
            yield TensorPiece(
                name=_global_name(layer, name),
                kind=KIND,
                tensor=rows,
                full_shape=(len(rows) * topology.data_size, *rows.shape[1:]),
                dimension=0,
                offset=len(rows) * topology.data_rank,
            )


def check_carried_states(reader: CheckpointReader, config: Config) -> None:
    """Whether rows can go on as in the run that wrote a checkpoint.

    Raises:
        InputError: ``train.carry_state`` or, with it, ``train.global_batch_size`` has changed; the order of samples, of
            which the run's position is a count, depends on both.
    """
    train = config.train
    recorded = reader.state.get("config", {}).get("train", {})
    # A checkpoint of before there was such an option has none.
    changes = {"carry_state": recorded.get("carry_state", False)}
    if train.carry_state:
        changes["global_batch_size"] = recorded.get("global_batch_size")
    for key, before in changes.items():
        now = getattr(train, key)
        if before != now:
            raise InputError(
                f"{reader.path}: was trained with train.{key}={str(before).lower()}, but the configuration says "
                f"{str(now).lower()}; where rows of a batch go on from step to step this decides the order of samples, "
                f"which then cannot go on: set train.{key} back, or start anew in another run.directory"
            )


def restore_states(decoder: Decoder, reader: CheckpointReader, config: Config, topology: Topology) -> None:
    """Gives each of this rank's rows the states that it had when the checkpoint was written, if rows go on.

    Raises:
        InputError: the checkpoint lacks a state, or has one of another shape.
    """
    stored = set(reader.names(KIND))
    if decoder.between_steps is None or not stored:
        # Not one step has been applied.
        return
    train = config.train
    own = train.global_batch_size // topology.data_size
    states: list[States] = [{} for _ in range(own // train.micro_batch_size)]
    for layer, name, declared in _declared(decoder):
        global_name = _global_name(layer, name)
        if global_name in stored or None not in declared.shape:
            rows = _own_part(reader, global_name, declared, topology, train.global_batch_size)
        else:
            # Of a window of one token nothing is kept, and so nothing is stored.
            rows = decoder.layers[layer].mixer.initial_state(own, torch.device("cpu"))[name]
        for of_batch, part in zip(states, rows.split(train.micro_batch_size), strict=True):
            of_batch.setdefault(layer, {})[name] = part.to(topology.device, copy=True)
    decoder.between_steps.restore(states)


def _own_part(
    reader: CheckpointReader, name: str, declared: StateTensor, topology: Topology, global_rows: int
) -> Tensor:
    """This rank's rows and tensor-parallel share, ``(rows, ...)`` float32 on the CPU."""
    expected, found = (global_rows, *declared.shape), reader.shape(name, KIND)
    fits = len(expected) == len(found) and all(
        size in (None, there) for size, there in zip(expected, found, strict=True)
    )
    if not fits:
        raise InputError(
            f"{reader.path} is a checkpoint from another model: the state {name!r} has shape {list(found)} there, but "
            f"{list(expected)} in this configuration (None: any)"
        )
    own = global_rows // topology.data_size
    rows = reader.read(name, KIND, dimension=0, offset=own * topology.data_rank, length=own)
    if declared.shard_dimension is None:
        return rows
    return rows.chunk(topology.tensor_size, dim=1 + declared.shard_dimension)[topology.tensor_rank].contiguous()
