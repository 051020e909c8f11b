"""Formulas of plans against an mLSTM model: FLOPs as torch counts them, memory that is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.mlstm import MLSTMState, mlstm
from pretrain.config import Config
from pretrain.models.mlstm.config import MLSTMConfig
from pretrain.models.mlstm.cost import cost
from pretrain.models.parameters import initialise_weights
from pretrain.plan.layers import layer_costs
from tests.plan.conftest import ONE_PROCESS
from tests.plan.measuring import Allocations, build, bytes_kept, flop_counter


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_products_with_weights_are_apart_from_the_cells(load: Callable[..., Config], recompute: str) -> None:
    """The cell's products are batched, so torch counts them under another name."""
    config = load(
        "quickstart.yaml",
        *ONE_PROCESS,
        "data.sequence_length=100",
        f"train.recompute={recompute}",
        "model.num_layers=2",
        "model.hidden_size=64",
    )
    model = build(config)
    initialise_weights(model, 0)
    tokens = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(0))
    with flop_counter() as counter:
        model(tokens, tokens, torch.zeros(2, 100, dtype=torch.bool)).backward()
    head = 2 * config.model.vocab_size * config.model.hidden_size
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / tokens.numel()
    projections = sum(mixer.projection_flops_per_token for layer in layer_costs(config) for mixer in layer.mixers)
    passes = 3 if recompute == "none" else 4
    assert products == pytest.approx(passes * projections + 3 * head, rel=1e-9)


@pytest.mark.parametrize("sequence_length", [1, 5, 16, 24, 37])
def test_cell_flops_equal_what_torch_counts(sequence_length: int) -> None:
    config = MLSTMConfig(num_heads=2, chunk_size=8, query_key_factor=0.5, value_factor=1.5)
    estimate = cost(config, 32, sequence_length, 4, 1)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, sequence_length, 2, 8, generator=generator).requires_grad_() for _ in range(2))
    value = torch.randn(3, sequence_length, 2, 24, generator=generator).requires_grad_()
    gates = (torch.randn(3, sequence_length, 2, generator=generator).requires_grad_() for _ in range(2))
    tokens = 3 * sequence_length
    with flop_counter() as counter:
        output, _ = mlstm(query, key, value, *gates, chunk_size=8, backend="torch")
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward / tokens == pytest.approx(estimate.executed_scan_flops_per_token, rel=1e-9)
    backward = (counter.get_total_flops() - forward) / tokens
    assert backward == pytest.approx(estimate.executed_scan_backward_flops_per_token, rel=1e-9)


class _CellOnGPU(torch.autograd.Function):
    """Keeps what the Triton cell keeps: its inputs, its output, four scalars per token and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
        output = value.clone()
        scalars = [torch.zeros(forget_gate.shape) for _ in range(4)]
        ctx.save_for_backward(query, key, value, forget_gate, output, *scalars)
        return output


def _cell_on_gpu(*inputs: Tensor, **_: object) -> tuple[Tensor, MLSTMState]:
    return _CellOnGPU.apply(*inputs), MLSTMState(*(torch.zeros(1) for _ in range(3)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activation_bytes_equal_what_a_block_keeps(
    load: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    config = load("quickstart.yaml", *ONE_PROCESS, f"train.precision={precision}")
    monkeypatch.setattr("pretrain.models.mlstm.mixer.mlstm", _cell_on_gpu)
    model = build(config)
    initialise_weights(model, 0)
    # The difference between two lengths leaves out what does not grow with it.
    kept = (bytes_kept(model, 192) - bytes_kept(model, 64)) / 128
    # Without a fused norm, as here, each of the two norms keeps its result before the weight too.
    unfused = 2 * 4 * (config.model.hidden_size + 1)
    block = layer_costs(config)[0]
    # A block's output is the next one's first norm input, except that bfloat16 is converted there.
    converted = 0 if precision == "float32" else 2 * config.model.hidden_size
    expected = block.activation_bytes_per_token(config) + unfused + converted
    # A few scalars per head are rounded up in the formula.
    assert kept == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputation_keeps_each_blocks_input_alone(load: Callable[..., Config], precision: str) -> None:
    config = load("quickstart.yaml", *ONE_PROCESS, f"train.precision={precision}", "train.recompute=block")
    model = build(config)
    initialise_weights(model, 0)

    def kept(sequence_length: int) -> int:
        hidden = torch.randn(sequence_length, 1, config.model.hidden_size, dtype=model.compute_dtype)
        with Allocations() as allocations:
            output, _, states = model._blocks(hidden.requires_grad_(), {}, None, None, keep_states=True)
            states.clear()
        size = allocations.bytes_alive()
        assert output.requires_grad
        return size

    # Each block's output is the next one's input; the first input is the caller's.
    element = 4 if precision == "float32" else 2
    expected = config.model.num_layers * config.model.hidden_size * element
    assert (kept(192) - kept(64)) / 128 == pytest.approx(expected, rel=1e-2)
