"""Programs that run on every rank of a pool of workers."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.checkpoint import CheckpointReader, resolve_checkpoint
from pretrain.errors import InputError
from pretrain.models.loading import read_weights
from pretrain.parallel.build import build_engine, build_model
from pretrain.parallel.topology import build_topology
from tests.configurations import tiny_config
from tests.parallel.programs import local_weights, one_step


def distil(sections: dict[str, Any], student: str, steps: int) -> dict[str, Any]:
    """Trains a student on synthetic batches; each rank's losses with their terms, norms, and slices of the weights."""
    config = tiny_config(**sections)
    topology = build_topology(config)
    model = build_model(config)
    with CheckpointReader(resolve_checkpoint(student)) as reader:
        read_weights(model, reader)
    engine = build_engine(model, config, topology)
    before = local_weights(engine, topology)
    trajectory, terms = [], []
    for step in range(steps):
        trajectory.append(one_step(config, topology, engine, step))
        # As many labels as synthetic batches have, which the mean alone needs.
        terms.append(model.take_loss_terms(100))
    after = local_weights(engine, topology)
    changed = {name for name in after if (after[name][0] != before[name][0]).any()}
    return {"trajectory": trajectory, "terms": terms, "weights": after, "changed": changed}


def refusal(sections: dict[str, Any]) -> str:
    """Says why a student is not built; fails if it is."""
    config = tiny_config(**sections)
    build_topology(config)
    try:
        build_model(config)
    except InputError as error:
        return str(error)
    raise AssertionError("the student was built")


def gradients(sections: dict[str, Any], student: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of one micro-batch, and the gradients of this process's student."""
    from tests.parallel.programs import synthetic_batch

    config = tiny_config(**sections)
    build_topology(config)
    model = build_model(config)
    with CheckpointReader(resolve_checkpoint(student)) as reader:
        read_weights(model, reader)
    batch = synthetic_batch([0, 1], config.data.sequence_length)
    loss = model(batch.tokens, batch.labels, batch.document_starts)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
