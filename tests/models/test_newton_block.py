"""ParaGRU and ParaLSTM beyond what the conformance suite asks: first weights, bounds, figures of the solver."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pretrain.models.para_gru.mixer as para_gru
from pretrain.models.para_gru.config import ParaGRUConfig
from pretrain.models.para_lstm.config import ParaLSTMConfig
from pretrain.models.parameters import initialise_weights
from pretrain.models.registry import family_of
from tests.conformance.tools import context_of

WIDTH = 64


def build(config):
    mixer = family_of(config).module(config, context_of(WIDTH))
    initialise_weights(mixer, seed=1)
    return mixer


@pytest.mark.parametrize("family", [ParaGRUConfig, ParaLSTMConfig])
def test_recurrent_weights_start_within_the_bound_that_training_keeps(family) -> None:
    mixer = build(family(num_heads=2, recurrent_bound=0.1))
    bounded = {name for name, parameter in mixer.named_parameters() if parameter.spec.bound is not None}
    assert bounded == {"recurrent"} | ({"peephole"} if family is ParaLSTMConfig else set())
    for name in bounded:
        parameter = mixer.get_parameter(name)
        assert parameter.spec.bound == 0.1 and float(parameter.detach().abs().max()) == pytest.approx(0.1)
    wide = build(family(num_heads=2)).recurrent.detach()
    # The standard deviation of 192 values is within a sixth of theirs.
    assert float(wide.std()) == pytest.approx(2 / math.sqrt(5 * WIDTH), rel=1 / 6)


@pytest.mark.parametrize("family", [ParaGRUConfig, ParaLSTMConfig])
def test_memory_bias_is_the_log_odds_of_keeping_the_old_state(family) -> None:
    mixer = build(family(num_heads=2, memory_bias=(2.0, 4.0)))
    first = mixer.bias[0]
    # ParaGRU's first gate lets the new value in, ParaLSTM's keeps the old one.
    kept = torch.sigmoid(first) if family is ParaLSTMConfig else 1 - torch.sigmoid(first)
    torch.testing.assert_close(torch.logit(kept), torch.linspace(2.0, 4.0, WIDTH), rtol=1e-4, atol=1e-5)
    assert not mixer.bias[1:].any()


@pytest.mark.parametrize("family", [ParaGRUConfig, ParaLSTMConfig])
def test_no_decay_of_recurrent_weights_biases_and_norms(family) -> None:
    mixer = build(family(num_heads=2))
    decayed = {name for name, parameter in mixer.named_parameters() if parameter.spec.weight_decay}
    maps = {"projections.input_weight", "projections.output_gate_weight", "output.weight"}
    assert decayed == maps | {"convolution_weight", "input_map"}


def test_figures_are_the_worst_and_the_sum_since_they_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = iter([(1e-3, 4, 2), (1e-5, 7, 1), (1e-2, 3, 0)])
    solve, calls = para_gru.newton_gru, []

    def scripted(*inputs, **options):
        hidden, final, report = solve(*inputs, **options)
        calls.append(options)
        if len(calls) == 4:
            return hidden, final, report
        residual, iterations, fallbacks = map(torch.tensor, next(reports))
        return hidden, final, report._replace(residual=residual, iterations=iterations, fallbacks=fallbacks)

    monkeypatch.setattr(para_gru, "newton_gru", scripted)
    config = ParaGRUConfig(num_heads=2, newton_iterations=2, newton_max_iterations=9, newton_tolerance=1e-3)
    mixer = build(config)
    hidden = torch.randn(8, 2, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(2):
        mixer(hidden, None, None)
    output, _ = checkpoint(mixer, hidden, None, None, use_reentrant=False)
    output.sum().backward()
    assert len(calls) == 4, "the recomputed block solves once more"
    assert {"iterations": 2, "max_iterations": 9, "tolerance": 1e-3}.items() <= calls[0].items()
    found = mixer.take_metrics()
    assert found == {"newton_residual": pytest.approx(1e-2), "newton_iterations": 7.0, "newton_fallbacks": 3.0}
    assert mixer.take_metrics() == dict.fromkeys(mixer.METRICS, 0.0)
