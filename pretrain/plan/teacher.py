"""The teacher of a run: what it is, from its checkpoint's own configuration. Imports no torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.directory import resolve_checkpoint
from pretrain.checkpoint.format import read_manifest, read_state
from pretrain.config import parse_config
from pretrain.config.distillation import replaced_layers
from pretrain.config.model import ModelConfig
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.plan.costs import BYTES_PER_ELEMENT
from pretrain.plan.layer_bytes import layer_bytes
from pretrain.plan.layers import BlockCost, layer_costs, shared_parameters


@dataclass(frozen=True)
class TeacherCost:
    """A model that is only read, beside the one that learns.

    Attributes:
        config: the run's, with the teacher's model in place of the student's.
        layers: as :func:`pretrain.plan.layers.layer_costs` gives them.
        matched: layers whose outputs are compared.
    """

    config: Config
    layers: list[BlockCost]
    matched: int

    def parameters(self, tensor: int) -> int:
        """On one of ``tensor`` tensor-parallel ranks, whatever ZeRO does with the student's."""
        model = self.config.model
        tables = 1 if model.tie_embeddings else 2
        embedding = -(-model.vocab_size // tensor) * model.embedding_size
        outside = tables * embedding + model.embedding_size + shared_parameters(self.layers)
        return outside + sum(layer.parameters_per_rank(tensor) for layer in self.layers)

    def outputs(self, tokens: int) -> int:
        """Bytes of the residual streams behind the matched layers, of so many tokens, one model's."""
        parallel, element = self.config.parallel, BYTES_PER_ELEMENT[self.config.train.precision]
        split = parallel.tensor if parallel.sequence else 1
        return self.matched * tokens * self.config.model.hidden_size * element // split

    def forward_bytes(self, config: Config, tokens: int) -> float:
        """The most that its forward pass needs beside logits: less than what the largest layer would keep.

        Args:
            config: the run in the layout that is looked at.
        """
        laid_out = self.config.model_copy(update={"parallel": config.parallel, "train": config.train})
        return self.outputs(tokens) + tokens * max(layer.kept for layer in layer_bytes(laid_out, self.layers, 0))

    @functools.cached_property
    def forward_flops_per_token(self) -> float:
        """Executed, all tensor-parallel ranks together."""
        layers = sum(
            layer.positions_per_token
            * (
                mixer.projection_flops_per_token
                + mixer.executed_scan_flops_per_token
                + mixer.elementwise_scan_flops_per_token
            )
            for layer in self.layers
            for mixer in layer.mixers
        )
        return layers + 2.0 * self.config.model.vocab_size * self.config.model.embedding_size


def read_teacher(config: Config) -> TeacherCost | None:
    """The teacher of ``config.distillation``; None where there is none, or its checkpoint is not there yet.

    Raises:
        InputError: what is there is no complete checkpoint, or does not say what model it is of.
    """
    if config.distillation is None or not Path(config.distillation.teacher).exists():
        return None
    key = f"distillation.teacher={config.distillation.teacher}"
    try:
        checkpoint = resolve_checkpoint(Path(config.distillation.teacher))
        raw = read_state(checkpoint, read_manifest(checkpoint)).get("config")
    except InputError as error:
        raise InputError(f"distillation.teacher: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{key}: its state holds no run configuration under 'config'")
    model = parse_config(raw, f"{key}: configuration in {checkpoint}").model
    taught = config.model_copy(update={"model": model})
    return TeacherCost(taught, layer_costs(taught), len(_matched(config, model)))


def _matched(config: Config, teacher: ModelConfig) -> list[int]:
    settings = config.distillation.layer_outputs
    if settings.weight == 0:
        return []
    if isinstance(settings.layers, list):
        return sorted(set(settings.layers))
    return replaced_layers(config.model, teacher) if settings.layers == "replaced" else [*range(teacher.num_layers)]
