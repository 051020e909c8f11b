"""``bench train`` at tiny sizes: rates, rows, the missing peer, equal work; never how fast anything is."""

from __future__ import annotations

import importlib
import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from pretrain.bench import contestants
from pretrain.bench.contestants import Workload, our_model, our_step, peer_model, peer_step, product_shapes
from pretrain.bench.train import bench_train, count_flops, table
from pretrain.plan import model_flops_per_token
from pretrain.plan.estimate import hardware_flops_per_token

TINY = Workload(batch_size=2, sequence_length=64, hidden_size=32, num_layers=2, num_heads=2, vocab_size=48)


@pytest.fixture
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "PEER_MODULE", "no_such_package.model")


def drawn(result) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table(result))
    return console.file.getvalue()


def test_rows_hold_finite_positive_rates():
    pytest.importorskip("xlstm.xlstm_large.model")
    lines: list[str] = []
    result = bench_train(TINY, rounds=2, say=lines.append)
    for row in result.rows:
        assert row.missing is None
        assert row.flops > 0
        assert len(row.seconds) == len(row.processor_seconds) == 2
        assert all(math.isfinite(rate) and rate > 0 for rate in row.flops_per_second())
        assert all(math.isfinite(share) and share > 0 for share in result.shares(row))
    assert result.shares(result.square) == [1.0, 1.0]
    ours, peer = result.ours.seconds, result.peer.seconds
    assert result.ratios() == [peer[0] / ours[0], peer[1] / ours[1]]
    assert result.ours.tokens_per_second() == [128 / seconds for seconds in ours]
    text = drawn(result)
    assert all(row.name in text for row in result.rows)
    assert json.loads(json.dumps(result.to_dict()))["rows"]["ours"]["flops"] == result.ours.flops
    assert len(lines) == 3


def test_without_the_peer_the_rest_is_measured(no_peer: None):
    result = bench_train(TINY, rounds=1)
    assert "pip install" in result.peer.missing
    assert result.peer.missing in drawn(result)
    assert result.ratios() == result.processor_ratios() == []
    assert result.ours.tokens_per_second()[0] > 0
    assert result.to_dict()["rows"]["xlstm package"]["missing"] == result.peer.missing


def test_counted_flops_are_those_of_the_plan():
    model = our_model(TINY)
    config = TINY.config()
    counted = count_flops(our_step(TINY, model)) / TINY.tokens
    assert counted == pytest.approx(hardware_flops_per_token(config), rel=1e-9)
    # The plan's useful work leaves out what is masked, which at this size is a good part of the cell's.
    assert 0.8 * counted < model_flops_per_token(config) < counted


def test_bare_products_are_those_of_the_model():
    model = our_model(TINY)
    shapes = product_shapes(TINY, model)
    step = our_step(TINY, model)
    with FlopCounterMode(display=False) as counter:
        step.run()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert sum(2 * rows * inner * columns for rows, inner, columns in shapes) == products


def test_both_models_do_the_same_work():
    pytest.importorskip("xlstm.xlstm_large.model")

    class OneDocumentPerRow(Workload):
        def batch(self):
            batch = super().batch()
            batch.document_starts[:, 1:] = False
            return batch

    workload = OneDocumentPerRow(**vars(TINY))
    model = our_model(workload)
    peer = peer_model(workload, model)
    # Same weights, same function: float32 sums in another order differ by a few units of 6e-8.
    assert peer_step(workload, peer).run() == pytest.approx(our_step(workload, model).run(), rel=1e-5)
    gradients = dict(peer.named_parameters())
    for ours, theirs in (("head.weight", "lm_head.weight"), ("embedding.weight", "embedding.weight")):
        gradient = model.get_parameter(ours).grad
        torch.testing.assert_close(gradient, gradients[theirs].grad, rtol=1e-3, atol=1e-6)


def test_no_weight_and_no_token_is_trivial():
    model = our_model(TINY)
    assert all(parameter.std() > 0 for parameter in model.parameters())
    batch = TINY.batch()
    assert batch.tokens.float().std() > 1
    assert batch.document_starts[:, 0].all()
    our_step(TINY, model).run()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_the_peer_needs_its_package(no_peer: None):
    with pytest.raises(contestants.PeerMissing, match="pip install"):
        peer_model(TINY, our_model(TINY))
    assert importlib.util.find_spec("no_such_package") is None
