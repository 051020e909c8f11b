"""Formulas of plans against the model itself: parameters, FLOPs as torch counts them, memory that is kept."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kernels.mlstm import MLSTMState, mlstm
from pretrain.config import Config
from pretrain.models.decoder import Decoder
from pretrain.models.mixer import Documents
from pretrain.models.mlstm.config import MLSTMConfig
from pretrain.models.mlstm.cost import cost
from pretrain.models.parameters import initialise_weights
from pretrain.parallel.topology import build_topology, megatron_config
from pretrain.plan import plan
from pretrain.plan.estimate import hardware_flops_per_token
from pretrain.plan.memory import layer_costs

ONE_PROCESS = ("train.device=cpu", "parallel.tensor=1", "parallel.sequence=false", "parallel.zero=0")


def _model(config: Config) -> Decoder:
    build_topology(config)
    return Decoder(config.model, megatron_config(config))


def _baddbmm_flops(_: object, left: torch.Size, right: torch.Size, **__: object) -> int:
    batch, rows, inner = left
    return 2 * batch * rows * inner * right[2]


def _counter() -> FlopCounterMode:
    """Torch's counter, taught the in-place form of baddbmm, which it leaves out."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _baddbmm_flops})


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("xlstm_165m", 162_303_840),
        ("xlstm_1.3b", 1_420_839_104),
        ("xlstm_2.7b", 2_780_449_600),
        ("xlstm_7b", 6_865_424_896),
    ],
)
def test_published_sizes_in_the_plan_and_in_the_model(load: Callable[..., Config], name: str, published: int) -> None:
    config = load(f"runs/{name}.yaml", *ONE_PROCESS)
    with torch.device("meta"):
        model = _model(config)
    estimate = plan(config, 1)
    assert estimate.parameters == published
    assert estimate.stages[0].parameters == published
    assert sum(parameter.numel() for parameter in model.parameters()) == published


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("sequence_length", [64, 100])
def test_executed_flops_equal_what_torch_counts(
    load: Callable[..., Config], recompute: str, sequence_length: int
) -> None:
    config = load(
        "quickstart.yaml",
        *ONE_PROCESS,
        f"data.sequence_length={sequence_length}",
        f"train.recompute={recompute}",
        "model.num_layers=2",
        "model.hidden_size=64",
        "model.blocks.mlstm.mixer.chunk_size=32",
    )
    model = _model(config)
    initialise_weights(model, 0)
    tokens = torch.randint(0, 256, (2, sequence_length), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(2, sequence_length, dtype=torch.bool)
    starts[:, 0] = True
    with _counter() as counter:
        loss = model(tokens, tokens, starts)
        forward = counter.get_total_flops() / tokens.numel()
        loss.backward()
    mixers = [mixer for layer in layer_costs(config) for mixer in layer.mixers]
    head = 2 * config.model.vocab_size * config.model.hidden_size
    expected = sum(m.projection_flops_per_token + m.executed_scan_flops_per_token for m in mixers) + head
    assert forward == pytest.approx(expected, rel=1e-9)
    total = counter.get_total_flops() / tokens.numel()
    assert total == pytest.approx(hardware_flops_per_token(config), rel=1e-9)
    assert plan(config).flops_per_token < hardware_flops_per_token(config)

    # Products with weights, apart from the cell's batched products.
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / tokens.numel()
    projections = sum(mixer.projection_flops_per_token for mixer in mixers)
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
    with _counter() as counter:
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


class _Allocations(TorchDispatchMode):
    """Remembers every storage that an operation returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes_alive(self) -> int:
        gc.collect()
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def _bytes_kept(model: Decoder, sequence_length: int) -> int:
    """Bytes alive between a block's forward and backward pass, its output included, its input not."""
    hidden = torch.randn(sequence_length, 1, model.model.hidden_size, dtype=model.compute_dtype)
    starts = torch.zeros(1, sequence_length, dtype=torch.bool)
    with _Allocations() as allocations:
        output, state = model.layers["0"](hidden.requires_grad_(), None, Documents(starts))
        del state
    kept = allocations.bytes_alive()
    assert output.requires_grad
    return kept


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activation_bytes_equal_what_a_block_keeps(
    load: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    config = load("quickstart.yaml", *ONE_PROCESS, f"train.precision={precision}")
    monkeypatch.setattr("pretrain.models.mlstm.mixer.mlstm", _cell_on_gpu)
    model = _model(config)
    initialise_weights(model, 0)
    # The difference between two lengths leaves out what does not grow with it.
    kept = (_bytes_kept(model, 192) - _bytes_kept(model, 64)) / 128
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
    model = _model(config)
    initialise_weights(model, 0)

    def kept(sequence_length: int) -> int:
        hidden = torch.randn(sequence_length, 1, config.model.hidden_size, dtype=model.compute_dtype)
        with _Allocations() as allocations:
            output, states = model._blocks(hidden.requires_grad_(), None, None, keep_states=True)
            states.clear()
        size = allocations.bytes_alive()
        assert output.requires_grad
        return size

    # Each block's output is the next one's input; the first input is the caller's.
    element = 4 if precision == "float32" else 2
    expected = config.model.num_layers * config.model.hidden_size * element
    assert (kept(192) - kept(64)) / 128 == pytest.approx(expected, rel=1e-2)
