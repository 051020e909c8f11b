"""Plans of models that choose their own chunks, where they have as many chunks as the plan expects."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pretrain.config import Config
from pretrain.models.hierarchy.chunking import find_chunks
from pretrain.models.hierarchy.hnet.dechunking import dechunk
from pretrain.models.hierarchy.hnet.routing import choose, straight_through
from pretrain.models.hierarchy.hnet.stage import HNetStage
from pretrain.models.parameters import initialise_weights
from pretrain.plan import model_flops_per_token, plan
from pretrain.plan.estimate import hardware_flops_per_token
from pretrain.plan.layers import layer_costs
from tests.plan.conftest import HIERARCHIES, ONE_PROCESS
from tests.plan.measuring import Allocations, build, flop_counter


def _as_measured(config: Config, metrics: dict[str, float]) -> Config:
    model = config.model.model_copy(update={"hierarchy": config.model.hierarchy.measured(metrics)})
    return config.model_copy(update={"model": model})


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("family", HIERARCHIES)
def test_executed_flops_equal_what_torch_counts(load: Callable[..., Config], family: str, recompute: str) -> None:
    config = load(f"runs/{family}_tiny.yaml", *ONE_PROCESS, "data.sequence_length=100", f"train.recompute={recompute}")
    model = build(config)
    initialise_weights(model, 0)
    tokens = torch.randint(0, 256, (1, 100), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(1, 100, dtype=torch.bool)
    starts[:, 0] = True
    inputs = [tokens, tokens, starts]
    if config.model.hierarchy.reads_word_starts:
        inputs.append(torch.arange(100)[None] % 4 == 0)
    with flop_counter() as counter:
        model(*inputs).backward()
    measured = _as_measured(config, model.take_metrics())
    chunks = 100 * measured.model.hierarchy.inner_positions_per_token
    assert chunks == pytest.approx(round(chunks)) and 2 < chunks < 80

    passes = 3 if recompute == "none" else 4
    elementwise = sum(
        (3 if layer.is_joint else passes) * layer.positions_per_token * mixer.elementwise_scan_flops_per_token
        for layer in layer_costs(measured)
        for mixer in layer.mixers
    )
    expected = hardware_flops_per_token(measured) - elementwise
    assert counter.get_total_flops() / 100 == pytest.approx(expected, rel=1e-6)
    assert model_flops_per_token(measured) <= hardware_flops_per_token(measured)


@pytest.mark.parametrize("family", [family for family in HIERARCHIES if family.startswith("hnet")])
def test_inner_layers_cost_what_their_share_of_positions_does(load: Callable[..., Config], family: str) -> None:
    config = load(f"runs/{family}_tiny.yaml", *ONE_PROCESS)
    estimate = plan(config, 1)
    ratios = [stage.target_ratio for stage in config.model.hierarchy.stages]
    assert estimate.tokens_per_inner_position == pytest.approx(math.prod(ratios))
    # Twice as many bytes a chunk: the innermost layers' products are half as many.
    metrics = {f"bytes_per_chunk_{stage}": 2 * math.prod(ratios[: stage + 1]) for stage in range(len(ratios))}
    inner = [layer for layer in layer_costs(config)[: config.model.num_layers]]
    coarser = [layer for layer in layer_costs(_as_measured(config, metrics))[: config.model.num_layers]]
    for before, after in zip(inner, coarser, strict=True):
        assert after.positions_per_token == pytest.approx(before.positions_per_token / 2)
        assert after.mixers[0].projection_flops_per_token == before.mixers[0].projection_flops_per_token
    assert plan(_as_measured(config, metrics), 1).flops_per_token < estimate.flops_per_token


def test_words_cost_what_their_share_of_positions_does(load: Callable[..., Config]) -> None:
    config = load("runs/hat_tiny.yaml", *ONE_PROCESS)
    estimate = plan(config, 1)
    assert estimate.tokens_per_inner_position == pytest.approx(config.model.hierarchy.bytes_per_word)
    longer = _as_measured(config, {"bytes_per_word": 2 * config.model.hierarchy.bytes_per_word})
    pairs = list(zip(layer_costs(config), layer_costs(longer), strict=True))
    changed = [after.positions_per_token / before.positions_per_token for before, after in pairs]
    joints = 1 + len(config.model.hierarchy.decoder)
    # The backbone's layers, and what is done once a word: pooling's output, and each reader's part.
    assert changed.count(0.5) == config.model.num_layers + joints
    assert changed.count(1.0) == len(changed) - config.model.num_layers - joints
    assert plan(longer, 1).flops_per_token < estimate.flops_per_token


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activation_bytes_of_what_joins_words_with_bytes(load: Callable[..., Config], precision: str) -> None:
    expected_words = "model.hierarchy.bytes_per_word=4.0"
    config = load("runs/hat_tiny.yaml", *ONE_PROCESS, f"train.precision={precision}", expected_words)
    model = build(config)
    initialise_weights(model, 0)
    length, size = 600, config.model.hierarchy.hidden_size
    encoded = torch.randn(length, 1, size, dtype=model.compute_dtype).requires_grad_()
    word = (torch.arange(length) // 4)[None]
    with Allocations() as allocations:
        pooled = model.pooling(encoded, word, length // 4)
        hidden = model.readers[0](encoded, pooled, word)
    kept = allocations.bytes_alive() - hidden.untyped_storage().nbytes()
    joints = [layer for layer in layer_costs(config) if layer.is_joint]
    expected = sum(layer.activation_bytes_per_token(config) for layer in joints)
    assert kept / length == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activation_bytes_of_what_joins_stages(load: Callable[..., Config], precision: str) -> None:
    config = load(
        "runs/hnet_1stage_tiny.yaml",
        *ONE_PROCESS,
        f"train.precision={precision}",
        "model.hierarchy.stages=[{hidden_size: 64, encoder: [mamba2], decoder: [mamba2], target_ratio: 2.0}]",
    )
    model = build(config)
    initialise_weights(model, 0)
    stage: HNetStage = model.stages[0]
    length, size = 600, stage.hidden_size
    encoded = torch.randn(length, 1, size, dtype=model.compute_dtype).requires_grad_()
    # Every second position begins a chunk, as the target says.
    vectors = torch.randn(length // 2, size, dtype=model.compute_dtype).requires_grad_()
    with Allocations() as allocations:
        boundaries = choose(stage.router(encoded, None, None))
        chosen = torch.arange(length) % 2 == 0
        chunks = find_chunks(chosen[None], None, continues=False)
        smoothed, average = dechunk(vectors, boundaries.probability, chunks, None)
        del average
        residual = stage.residual(encoded)
        hidden = smoothed * straight_through(boundaries.confidence).t()[..., None] + residual
        del smoothed, residual, boundaries, chunks, chosen
    kept = allocations.bytes_alive() - hidden.untyped_storage().nbytes()
    (joint,) = [layer for layer in layer_costs(config) if layer.is_joint and layer.mixers[0].parameters]
    # Factors, places and norms are a few numbers per position.
    assert kept / length == pytest.approx(joint.mixers[0].activation_bytes_per_token, rel=0.12)
