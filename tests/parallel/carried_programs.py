"""Programs with states that go on from step to step, for every rank of a pool of workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from data.order import rank_share
from pretrain.checkpoint.recurrent_states import state_pieces
from pretrain.optimizer.learning_rate import learning_rate
from pretrain.parallel.schedule import run_schedule
from tests.configurations import tiny_config
from tests.parallel.programs import local_weights, open_engine, synthetic_batch


def going_on(batch: Batch, indices: list[int], step: int) -> Batch:
    """The batch with rows that begin a document, every third one, or go on; at the first step all begin."""
    starts = batch.document_starts.clone()
    starts[:, 0] = torch.tensor([step == 0 or index % 3 == 0 for index in indices])
    return replace(batch, document_starts=starts)


def stored_states(pieces: Any) -> dict[str, tuple[int, np.ndarray]]:
    """What a rank would write: first row and values, by name."""
    return {piece.name: (piece.offset, piece.tensor.numpy().copy()) for piece in pieces}


def train_steps(overrides: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    """Trains on synthetic batches whose rows go on; losses, norms, final weights and states of this rank."""
    config = tiny_config(**overrides)
    torch.manual_seed(dist.get_rank())
    topology, engine = open_engine(config)
    trajectory = []
    size = config.train.global_batch_size
    for step in range(steps):
        indices = range(step * size, (step + 1) * size)
        shares = rank_share(indices, config.train.micro_batch_size, topology.data_rank, topology.data_size)
        batches = [going_on(synthetic_batch(share, config.data.sequence_length), share, step) for share in shares]
        with engine.accumulate():
            loss = run_schedule(engine.model, engine.decoder, batches, topology.device, train=True)
        # Between a forward pass and the end of its step, as nothing else in a run, an evaluation.
        run_schedule(engine.model, engine.decoder, batches, topology.device, train=False)
        result = engine.step(learning_rate(config, step))
        engine.decoder.between_steps.finish(keep=result.applied)
        trajectory.append((loss.nats_per_token, result.gradient_norm, result.applied))
    states = stored_states(state_pieces(engine.decoder, topology))
    return {"trajectory": trajectory, "weights": local_weights(engine, topology), "states": states}


def whole_states(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """States of the global batch from what all ranks would write, each row once."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for result in results:
        for name, (offset, values) in result["states"].items():
            assert offset not in parts.setdefault(name, {}), f"{name}: rows from {offset} stand twice"
            parts[name][offset] = values
    return {name: np.concatenate([rows[offset] for offset in sorted(rows)]) for name, rows in parts.items()}
