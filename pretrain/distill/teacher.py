"""The teacher of a run: another model in the same layout, which is only read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from pretrain.checkpoint import CheckpointReader, resolve_checkpoint
from pretrain.config import Config, parse_config
from pretrain.config.model import ModelConfig
from pretrain.errors import InputError
from pretrain.models.building import build_decoder
from pretrain.models.decoder import Decoder
from pretrain.models.loading import read_weights
from pretrain.models.mixer import Documents
from pretrain.parallel.topology import megatron_config


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of one micro-batch.

    Attributes:
        logits: ``(sequence, batch, vocabulary / tensor-parallel ranks)`` float32.
        outputs: the residual stream behind each layer that was asked for, ``(sequence, batch, hidden_size)``; under
            sequence parallelism this rank's part of the sequence.
    """

    logits: Tensor
    outputs: dict[str, Tensor]


class Teacher:
    """A model that learns nothing; no module, so that no engine takes its weights.

    Attributes:
        decoder: this tensor-parallel rank's part, whatever ZeRO does with the student's.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder.eval().requires_grad_(False)

    @property
    def model(self) -> ModelConfig:
        return self.decoder.model

    @torch.no_grad()
    def teach(self, tokens: Tensor, documents: Documents, layers: list[str]) -> Lesson:
        """Reads ``(batch, sequence)`` tokens, and keeps what is behind ``layers``."""
        return Lesson(*self.decoder.logits_and_outputs(tokens, documents, layers))


def open_teacher(config: Config) -> Teacher:
    """Reads the teacher of ``config.distillation``, this rank's part of it; the groups of the layout must exist.

    Raises:
        InputError: there is no complete checkpoint, or its model does not go with the student or the layout.
    """
    key = f"distillation.teacher={config.distillation.teacher}"
    try:
        checkpoint = resolve_checkpoint(Path(config.distillation.teacher))
    except InputError as error:
        raise InputError(f"distillation.teacher: {error}") from None
    with CheckpointReader(checkpoint) as reader:
        raw = reader.state.get("config")
        if not isinstance(raw, dict):
            raise InputError(f"{key}: its state holds no run configuration under 'config'")
        taught = parse_config(raw, f"{key}: configuration in {reader.path}")
        model = taught.model
        problem = _tokenizer_problem(taught, config) or _problem(model, config)
        if problem:
            raise InputError(f"{key}: {problem}")
        decoder = build_decoder(model, megatron_config(config.model_copy(update={"model": model})))
        read_weights(decoder, reader)
    return Teacher(decoder)


def _tokenizer_problem(teacher: Config, config: Config) -> str | None:
    theirs, ours = teacher.data.tokenizer.type, config.data.tokenizer.type
    if theirs == ours:
        return None
    return f"reads tokens of type {theirs}, but data.tokenizer.type is {ours}; both must read the same tokens"


def _problem(teacher: ModelConfig, config: Config) -> str | None:
    """Why a model cannot teach this one in this layout, in one clause; None where it can."""
    student = config.model
    if teacher.hierarchy is not None:
        return f"is a hierarchy ({teacher.hierarchy.type}), whose positions are not those of the student"
    if teacher.vocab_size != student.vocab_size:
        return (
            f"has vocab_size={teacher.vocab_size}, but model.vocab_size is {student.vocab_size}; both must read and "
            f"predict the same tokens"
        )
    problem = teacher.block_problem(parallel_state.get_tensor_model_parallel_world_size())
    if problem:
        return f"model.{problem}"
    outputs = config.distillation.layer_outputs.weight > 0 or config.distillation.train_only == "replaced"
    for name in ("num_layers", "hidden_size"):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if outputs and theirs != ours:
            return (
                f"has {name}={theirs}, but the student has {ours}, and distillation.layer_outputs and "
                f"distillation.train_only compare layer by layer"
            )
    return None
