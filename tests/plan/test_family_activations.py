"""Bytes that plans foretell for the blocks of every family, against what those blocks keep for the backward pass.

A plan is of a GPU, and these tests run without one. Where the CPU's form of a cell keeps the same tensors as the
GPU's, it runs; where it does not, a stand-in keeps what the Triton kernel hands to ``save_for_backward``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.mlstm import MLSTMState
from kernels.slstm import SLSTMState
from pretrain.config import Config
from pretrain.models.attention.config import AttentionConfig
from pretrain.models.decoder import Decoder
from pretrain.models.parameters import initialise_weights
from pretrain.models.slstm.config import SLSTMConfig
from pretrain.plan import plan
from pretrain.plan.costs import BYTES_PER_ELEMENT
from pretrain.plan.layers import layer_costs
from tests.plan.conftest import FAMILIES, ONE_PROCESS
from tests.plan.measuring import build, bytes_kept


class _Mlstm(torch.autograd.Function):
    """Keeps inputs, output, and four scalars per token and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
        output = value.clone()
        scalars = [torch.zeros(forget_gate.shape) for _ in range(4)]
        ctx.save_for_backward(query, key, value, forget_gate, output, *scalars)
        return output


def _mlstm(*inputs: Tensor, **_: object) -> tuple[Tensor, MLSTMState]:
    return _Mlstm.apply(*inputs), MLSTMState(*(torch.zeros(1) for _ in range(3)))


class _Slstm(torch.autograd.Function):
    """Keeps four activations and the mean in float32, and the hidden states in the dtype of the gates."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, recurrent: Tensor) -> Tensor:
        hidden = torch.zeros_like(gates[:, :, 0], memory_format=torch.contiguous_format)
        activations, means = torch.zeros(gates.shape), torch.zeros(hidden.shape)
        ctx.save_for_backward(recurrent, activations, means, hidden)
        return hidden


def _slstm(gates: Tensor, recurrent: Tensor, *_: object, **__: object) -> tuple[Tensor, SLSTMState]:
    return _Slstm.apply(gates, recurrent), SLSTMState(*(torch.zeros(1) for _ in SLSTMState._fields))


STAND_INS = {
    "pretrain.models.mlstm.mixer.mlstm": _mlstm,
    "pretrain.models.mlstm_pre_up.mixer.mlstm": _mlstm,
    "pretrain.models.slstm.mixer.slstm": _slstm,
}


def _beyond_the_plan(config: Config, block: str) -> float:
    """Bytes per token that one process without a GPU keeps beyond what a plan counts on."""
    model, section = config.model, config.model.blocks[block]
    more, norms = 0.0, sum(part is not None for part in (section.mixer, section.channel))
    # There is no fused RMS norm here: it keeps its result before the weight too. Layer norm keeps two statistics.
    more += 4 * norms * (model.hidden_size + 1 if model.norm == "rms" else 2)
    if config.train.precision == "bfloat16":
        # A block's output is the next one's first norm input, which is converted there.
        more += 2 * model.hidden_size
    element = BYTES_PER_ELEMENT[config.train.precision]
    if isinstance(section.mixer, SLSTMConfig):
        # One rank's channels of the input are the block's own; several ranks each copy theirs.
        more -= element * model.hidden_size
    if isinstance(section.mixer, AttentionConfig):
        # On a GPU, which is not waited for, a mask keeps documents apart even where there is but one.
        more -= element * config.data.sequence_length
    if isinstance(section.mixer, AttentionConfig) and section.mixer.rotary_fraction == 0:
        # Attention's output has its queries' layout here, and unless they were rotated that is the projection's.
        heads = section.mixer.num_heads * section.mixer.size_of_head(model.hidden_size)
        more -= element * heads
    return more


def _slope(model: Decoder, layer: int) -> float:
    """Bytes kept per token; the difference between two lengths leaves out what does not grow with them."""
    # Two sequences: of one alone, what is laid out anew needs no copy.
    return (bytes_kept(model, 192, layer, batch=2) - bytes_kept(model, 64, layer, batch=2)) / (2 * 128)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_bytes_equal_what_each_kind_of_block_keeps(
    load: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, family: str, precision: str
) -> None:
    config = load(f"runs/{family}_tiny.yaml", *ONE_PROCESS, f"train.precision={precision}")
    for name, stand_in in STAND_INS.items():
        monkeypatch.setattr(name, stand_in)
    model = build(config)
    initialise_weights(model, 0)
    for block in config.model.blocks:
        layer = config.model.layers.index(block)
        expected = layer_costs(config)[layer].activation_bytes_per_token(config) + _beyond_the_plan(config, block)
        kept = _slope(model, layer)
        # Statistics of norms, a few float32 per token and head, are not all counted; these models are narrow.
        assert kept == pytest.approx(expected, rel=1e-2), f"{block}: {kept} bytes a token, not {expected}"


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_before_the_first_token(load: Callable[..., Config], family: str) -> None:
    """A recurrent state is kept once per sequence, whatever its length; a cache of keys is empty at the beginning."""
    config = load(f"runs/{family}_tiny.yaml", *ONE_PROCESS)
    short, long = (
        load(f"runs/{family}_tiny.yaml", *ONE_PROCESS, f"data.sequence_length={length}") for length in (32, 64)
    )
    parts = [plan(sized, 1).bytes_per_rank_by_part["states"] for sized in (short, long)]
    assert parts[0] == parts[1]
    model = build(config)
    tensors = [
        tensor
        for block in model.layers.values()
        if block.mixer is not None
        for tensor in block.mixer.initial_state(config.train.micro_batch_size, torch.device("cpu")).values()
    ]
    assert parts[0] == sum(4 * tensor.numel() for tensor in tensors) > 0
