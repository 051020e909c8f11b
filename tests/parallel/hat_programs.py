"""Programs over hierarchical autoregressive models that run on every rank of a pool of workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from data.order import rank_share
from pretrain.models.block import metric_reductions
from pretrain.optimizer.learning_rate import learning_rate
from pretrain.parallel.agreement import combine_ranks
from pretrain.parallel.schedule import run_schedule
from pretrain.plan import plan
from tests.configurations import tiny_config
from tests.models.hat_models import WORDS, hat_model, random_words
from tests.parallel.programs import local_weights, open_engine, synthetic_batch


def hat_steps(overrides: dict[str, dict[str, Any]], steps: int, model: dict[str, Any] | None = None) -> dict[str, Any]:
    """Trains on synthetic batches; every rank returns losses, norms, metrics, slices of the final weights.

    The model is that of the tests, unless one is given.
    """
    config = tiny_config(model=model or hat_model(), **{"data": WORDS, **overrides})
    torch.manual_seed(dist.get_rank())
    topology, engine = open_engine(config)
    train, trajectory, metrics = config.train, [], []
    for step in range(steps):
        indices = range(step * train.global_batch_size, (step + 1) * train.global_batch_size)
        batches = []
        for share in rank_share(indices, train.micro_batch_size, topology.data_rank, topology.data_size):
            batch = synthetic_batch(share, config.data.sequence_length)
            rows = zip(batch.document_starts, share, strict=True)
            words = torch.stack([random_words(starts, index) for starts, index in rows])
            batches.append(replace(batch, word_starts=words))
        engine.decoder.take_metrics()
        with engine.accumulate():
            loss = run_schedule(engine.model, engine.decoder, batches, topology.device, train=True)
        result = engine.step(learning_rate(config, step))
        trajectory.append((loss.nats_per_token, result.gradient_norm, result.applied))
        found = engine.decoder.take_metrics()
        metrics.append(combine_ranks(found, metric_reductions(config.model), topology.device))
    return {
        "trajectory": trajectory,
        "metrics": metrics,
        "weights": local_weights(engine, topology),
        "planned_parameters": plan(config, dist.get_world_size()).stages[0].parameters,
    }
