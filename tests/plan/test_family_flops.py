"""FLOPs that plans foretell for a model of every family, against those that torch counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pretrain.config import Config
from pretrain.models.parameters import initialise_weights
from pretrain.plan import model_flops_per_token
from pretrain.plan.estimate import hardware_flops_per_token
from pretrain.plan.layers import layer_costs
from tests.plan.conftest import FAMILIES, ONE_PROCESS
from tests.plan.measuring import build, flop_counter


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("sequence_length", [32, 50])
@pytest.mark.parametrize("family", FAMILIES)
def test_executed_flops_equal_what_torch_counts(
    load: Callable[..., Config], family: str, sequence_length: int, recompute: str
) -> None:
    config = load(
        f"runs/{family}_tiny.yaml",
        *ONE_PROCESS,
        f"data.sequence_length={sequence_length}",
        f"train.recompute={recompute}",
    )
    model = build(config)
    initialise_weights(model, 0)
    tokens = torch.randint(0, 256, (2, sequence_length), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(2, sequence_length, dtype=torch.bool)
    starts[:, 0] = True
    with flop_counter() as counter:
        loss = model(tokens, tokens, starts)
        forward = counter.get_total_flops() / tokens.numel()
        loss.backward()
    total = counter.get_total_flops() / tokens.numel()

    mixers = [mixer for layer in layer_costs(config) for mixer in layer.mixers]
    head = 2 * config.model.vocab_size * config.model.hidden_size
    expected = sum(mixer.projection_flops_per_token + mixer.executed_scan_flops_per_token for mixer in mixers) + head
    assert forward == pytest.approx(expected, rel=1e-9)
    # Torch counts matrix products alone: what cells and convolutions do element by element stands beside them.
    passes = 3 if recompute == "none" else 4
    elementwise = sum(mixer.elementwise_scan_flops_per_token for mixer in mixers)
    assert total == pytest.approx(hardware_flops_per_token(config) - passes * elementwise, rel=1e-9)
    assert model_flops_per_token(config) <= hardware_flops_per_token(config)
