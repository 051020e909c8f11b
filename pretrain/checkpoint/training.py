"""What a checkpoint of a training run holds, and how it comes back under any layout."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from pretrain.checkpoint.format import STATE_FILE, Count
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.recurrent_states import state_pieces
from pretrain.checkpoint.shards import TensorPiece
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.models.parameters import full_shape, own_slice, padded_to
from pretrain.parallel.engine import MOMENTS, Engine
from pretrain.parallel.topology import Topology


@dataclass
class TrainingPosition:
    """Where a run stands.

    Attributes:
        step: optimizer steps that were taken or skipped.
        samples: place in the order of the data; those that a rollback left out count, though nobody read them.
        tokens: of the samples that were trained on.
        skipped_steps: steps whose gradient was not finite.
        skipped_in_a_row: how many of the last steps those were.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    @property
    def updates(self) -> int:
        """Steps that changed the weights: AdamW's own count."""
        return self.step - self.skipped_steps


def _writing_copies(engine: Engine, topology: Topology) -> dict[str, int]:
    """Which of the ranks that hold a parameter writes it: the one with the fewest elements so far."""
    loads = {False: [0] * topology.copy_size, True: [0] * topology.expert_data_size}
    writers = {}
    for name, parameter in engine.parameters.items():
        load = loads[parameter.spec.expert]
        writers[name] = load.index(min(load))
        load[writers[name]] += engine.shapes[name].numel()
    return writers


def training_pieces(engine: Engine, topology: Topology) -> Iterator[TensorPiece]:
    """This rank's part of a checkpoint, read as it is drawn; each element of a tensor comes from exactly one rank.

    Reading is collective over the data-parallel group (of experts: over the ranks that hold them), so every rank walks
    all of its parameters.
    """
    writers = _writing_copies(engine, topology)
    for name, parameter in engine.parameters.items():
        sharded = parameter.spec.shard_dimension
        shape = engine.shapes[name]
        copy_rank = topology.expert_data_rank if parameter.spec.expert else topology.copy_rank
        writes = copy_rank == writers[name] and (sharded is not None or topology.tensor_rank == 0)
        writes = writes and not parameter.spec.pipeline_copy
        for kind in ("weight", *MOMENTS):
            tensor = engine.read_state(name, kind)
            if tensor is None or not writes:
                continue
            tensor, offset = tensor.detach().reshape(shape), 0
            if sharded is not None:
                offset, length = own_slice(parameter.spec, shape)
                if length == 0:
                    continue
                tensor = tensor.narrow(sharded, 0, length)
            yield TensorPiece(
                name=name,
                kind=kind,
                tensor=tensor,
                full_shape=full_shape(parameter, shape),
                dimension=sharded,
                offset=offset,
            )
    yield from state_pieces(engine.decoder, topology)


def training_state(config: Config, position: TrainingPosition, data_state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds besides tensors, as JSON holds it; later steps do not change it.

    ``data_state`` is what a later start needs to go on with the same data.
    """
    return {
        "config": config.model_dump(mode="json"),
        "position": asdict(position),
        **copy.deepcopy(dict(data_state)),
        "random_state": torch.get_rng_state().numpy().tobytes().hex(),
    }


def state_of_import(config: Config, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What the state of a checkpoint says that holds the weights of another program's model.

    Args:
        config: whose model it is.
        origin: where the weights come from, as JSON holds it.
    """
    return {"config": config.model_dump(mode="json"), "position": asdict(TrainingPosition()), "imported_from": origin}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _StoredPosition(_Strict):
    model_config = ConfigDict(extra="forbid")

    step: Count
    samples: Count
    tokens: Count
    skipped_steps: Count = 0
    skipped_in_a_row: Count = 0


class _StoredConfig(_Strict):
    train: dict[str, Any]


class _StoredPhase(_Strict):
    first: Count
    weights: dict[str, float]


class _StoredRun(_Strict):
    """What a start reads of ``state.json`` before it computes anything; later programs may add to it."""

    config: _StoredConfig
    position: _StoredPosition
    data_fingerprint: str
    bookmarks: dict[str, dict[str, Any]] = {}
    source_fingerprints: dict[str, str] = {}
    mixture_phases: list[_StoredPhase] = []
    left_out_samples: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []
    recent_losses: list[float] = []
    random_state: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")]


def check_state(reader: CheckpointReader) -> None:
    """Raises ``InputError`` unless the state that ``reader``'s checkpoint holds is one that training can go on with."""
    try:
        _StoredRun.model_validate(reader.state)
        _generator_state(reader)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{reader.path / STATE_FILE}: {where}: {first['msg'][0].lower()}{first['msg'][1:]}; training cannot go on "
            f"from it, use another checkpoint"
        ) from None
    except RuntimeError as error:
        raise InputError(
            f"{reader.path / STATE_FILE}: random_state is none of torch's generator ({error}); use another checkpoint"
        ) from None


def _generator_state(reader: CheckpointReader) -> Tensor:
    """The state of torch's CPU generator; ``RuntimeError`` unless torch takes it."""
    stored = torch.frombuffer(bytearray.fromhex(reader.state["random_state"]), dtype=torch.uint8).clone()
    torch.Generator().set_state(stored)
    return stored


def begins_a_run(reader: CheckpointReader) -> bool:
    """Whether a checkpoint is imported: weights alone, with no moments, no data and no random state to go on with."""
    return "imported_from" in reader.state


def read_position(reader: CheckpointReader) -> TrainingPosition:
    """Where the run stood when ``reader``'s checkpoint was written; ``check_state`` has looked at it."""
    return TrainingPosition(**reader.state["position"])


def restore_random_state(reader: CheckpointReader) -> None:
    """Puts back the state of torch's CPU generator."""
    torch.set_rng_state(_generator_state(reader))


def read_moments(reader: CheckpointReader, engine: Engine) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """This rank's slices of AdamW's moments, one trained parameter after another.

    Of a parameter that was not trained so far they are zeros, as at the beginning.
    """
    stored = set(reader.names(MOMENTS[0]))
    # A checkpoint without any is no such case, and refused below.
    trained = stored.intersection(engine.parameters)
    for name, parameter in engine.parameters.items():
        if not parameter.requires_grad:
            continue
        if trained and name not in stored:
            yield name, {kind: torch.zeros(engine.shapes[name]) for kind in MOMENTS}
            continue
        dimension, shape = parameter.spec.shard_dimension, engine.shapes[name]
        moments = {}
        for kind in MOMENTS:
            if reader.shape(name, kind) != reader.shape(name):
                raise InputError(
                    f"{reader.path}: {kind} of {name!r} has another shape than its weight; use another one"
                )
            if dimension is None:
                moments[kind] = reader.read(name, kind)
            else:
                offset, length = own_slice(parameter.spec, shape)
                part = reader.read(name, kind, dimension=dimension, offset=offset, length=length)
                moments[kind] = padded_to(part, parameter.spec, shape)
        yield name, moments
