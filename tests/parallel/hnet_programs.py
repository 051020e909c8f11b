"""Programs over H-Nets that run on every rank of a pool of workers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pretrain.models.block import metric_reductions
from pretrain.parallel.agreement import combine_ranks
from pretrain.plan import plan
from tests.configurations import tiny_config
from tests.models.hnet_models import hnet_model
from tests.parallel.programs import local_weights, one_step, open_engine


def hnet_steps(
    stages: int, overrides: dict[str, dict[str, Any]], steps: int, model: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains on synthetic batches; every rank returns losses, norms, metrics, slices of the final weights.

    The model is that of the tests with so many stages, unless one is given.
    """
    model = model or hnet_model(stages)
    # So large that a ratio loss of a part of the batch would be seen.
    model["hierarchy"]["ratio_loss_weight"] = 5.0
    model["hierarchy"]["inner_learning_rate_factor"] = 0.5
    model["hierarchy"]["stages"] = [{**stage, "learning_rate_factor": 1.5} for stage in model["hierarchy"]["stages"]]
    config = tiny_config(model=model, **overrides)
    torch.manual_seed(dist.get_rank())
    topology, engine = open_engine(config)
    trajectory, metrics = [], []
    for step in range(steps):
        engine.decoder.take_metrics()
        trajectory.append(one_step(config, topology, engine, step))
        found = engine.decoder.take_metrics()
        metrics.append(combine_ranks(found, metric_reductions(config.model), topology.device))
    return {
        "trajectory": trajectory,
        "metrics": metrics,
        "weights": local_weights(engine, topology),
        "planned_parameters": plan(config, dist.get_world_size()).stages[0].parameters,
    }


def first_steps(parallel: dict[str, Any], rate: float, factors: list[float]) -> dict[str, float]:
    """How far the first step moves each parameter of two stages, at most; without decay nothing else moves it.

    ``factors`` are the learning-rate factors of the stages, and of the innermost network.
    """
    model = hnet_model(2)
    model["hierarchy"]["inner_learning_rate_factor"] = factors[-1]
    model["hierarchy"]["stages"] = [
        {**stage, "learning_rate_factor": factor}
        for stage, factor in zip(model["hierarchy"]["stages"], factors, strict=False)
    ]
    optimizer = {"learning_rate": rate, "weight_decay": 0.0, "epsilon": 1e-12, "gradient_clip": 0.0}
    config = tiny_config(model=model, parallel=parallel, optimizer=optimizer, schedule={"type": "constant"})
    topology, engine = open_engine(config)
    before = {name: engine.read_state(name, "weight").detach().clone() for name in engine.parameters}
    one_step(config, topology, engine, 0)
    return {
        name: (engine.read_state(name, "weight").detach() - value).abs().max().item() for name, value in before.items()
    }
