"""Builds what a training run computes with: this rank's part of the model, and its engine."""

from __future__ import annotations

from pretrain.config.schema import Config
from pretrain.distill.student import build_student
from pretrain.models.building import build_decoder
from pretrain.models.decoder import Decoder
from pretrain.models.states_between_steps import StatesBetweenSteps
from pretrain.optimizer.adamw import build_adamw
from pretrain.parallel.engine import Engine, ReplicatedEngine
from pretrain.parallel.topology import Topology, megatron_config


def build_model(config: Config) -> Decoder:
    """This rank's part of the model on the CPU, not yet filled; the groups must exist.

    Raises:
        InputError: there is a teacher, and it cannot be read or does not go with the model.
    """
    if config.distillation is not None:
        return build_student(config)
    model = build_decoder(config.model, megatron_config(config), config.parallel.stage_layers(config.model.num_layers))
    model.loss_chunk_size = config.train.loss_chunk_size
    if config.parallel.context > 1:
        model.hold_segments(config.context_scheme)
    if config.train.carry_state:
        model.between_steps = StatesBetweenSteps()
    return model


def build_engine(model: Decoder, config: Config, topology: Topology) -> Engine:
    """Moves the filled model to its device and wraps it; the engine keeps the weights it finds."""
    model.to(topology.device)
    optimizer = build_adamw(model, config.optimizer)
    if config.parallel.zero == 0:
        return ReplicatedEngine(model, optimizer, config.optimizer.gradient_clip)
    # Imported only here: DeepSpeed takes seconds to import and sets up a backend of its own.
    from pretrain.parallel.zero import ZeroEngine

    return ZeroEngine(model, optimizer, config)
