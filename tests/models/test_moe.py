"""The mixture of experts against its equations, written out token by token in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config import parse_config
from pretrain.errors import InputError
from pretrain.models.carried import initial_carried, pack, packed_channels, unpack
from pretrain.models.channel.moe.config import MoEConfig
from pretrain.models.channel.moe.experts import Experts
from pretrain.models.channel.moe.mixer import MoE
from pretrain.models.channel.moe.router import ROUTER_CELL
from pretrain.models.mixer import LayerContext
from pretrain.models.mixer_config import AUXILIARY_LOSS
from pretrain.models.parameters import initialise_weights
from pretrain.parallel.topology import build_topology, megatron_config
from tests.configurations import tiny_config
from tests.conformance.tools import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, assert_close, context_of

HIDDEN, LAYERS, SEQUENCE, BATCH = 12, 3, 7, 2
CONFIG = MoEConfig(
    num_experts=4,
    intermediate_size=10,
    shared_expert_size=6,
    shared_expert_share=0.3,
    router_size=5,
    balance_coefficient=0.7,
    z_coefficient=0.2,
)


def _layers(config: MoEConfig) -> list[MoE]:
    """Layers that share what they share, with random parameters."""
    context = context_of(HIDDEN)
    layers = [MoE(config, context) for _ in range(LAYERS)]
    shared = torch.nn.ModuleDict(MoE.shared_modules(config, context))
    model = torch.nn.ModuleDict({"shared": shared, **{str(index): layer for index, layer in enumerate(layers)}})
    initialise_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    for layer in layers:
        layer.share(shared)
    return layers


def _run(layers: list[MoE], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream after all layers, and the loss that they add, per token."""
    carried = initial_carried(hidden, layers[0].config.carried(HIDDEN))
    for layer in layers:
        output, carried = layer(hidden, carried)
        hidden = hidden + output
    return hidden, carried[AUXILIARY_LOSS].squeeze(-1)


def _swiglu(token: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (torch.nn.functional.silu(gate @ token) * (up @ token))


def _by_equations(
    config: MoEConfig, layers: list[dict[str, Tensor]], cell: dict[str, Tensor], hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from weights in float64: one token, one layer, one expert at a time."""
    stream = [[hidden[time, row] for row in range(BATCH)] for time in range(SEQUENCE)]
    states = [[hidden.new_zeros(config.router_size) for _ in range(BATCH)] for _ in range(SEQUENCE)]
    losses = [[hidden.new_zeros(()) for _ in range(BATCH)] for _ in range(SEQUENCE)]
    for weights in layers:
        chosen = torch.zeros(BATCH, config.num_experts, dtype=torch.float64)
        probabilities = {}
        for time in range(SEQUENCE):
            for row in range(BATCH):
                inputs, state = weights["router.input_weight"] @ stream[time][row], states[time][row]
                ir, iz, n = (cell["input_weight"] @ inputs + cell["input_bias"]).chunk(3)
                hr, hz, hn = (cell["state_weight"] @ state + cell["state_bias"]).chunk(3)
                reset, update = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
                state = (1 - update) * torch.tanh(n + reset * hn) + update * state
                states[time][row] = state
                logits = weights["router.output_weight"] @ state
                losses[time][row] = losses[time][row] + config.z_coefficient * torch.log(logits.exp().sum()) ** 2
                p = logits.exp() / logits.exp().sum()
                probabilities[time, row] = p
                best = sorted(range(config.num_experts), key=lambda e, p=p: -p[e].item())[: config.experts_per_token]
                chosen[row, best] += 1
                token, total = stream[time][row], sum(p[e] for e in best)
                output = sum(
                    p[e]
                    / total
                    * _swiglu(token, *(weights[f"experts.{part}_weight_{e}"] for part in ("gate", "up", "down")))
                    for e in best
                )
                shared = _swiglu(
                    token,
                    weights["shared_expert.projections.gate_weight"],
                    weights["shared_expert.projections.up_weight"],
                    weights["shared_expert.down.weight"],
                )
                share = config.shared_expert_share
                stream[time][row] = token + (1 - share) * output + share * shared
        for (time, row), p in probabilities.items():
            balance = config.num_experts * sum(chosen[row, e] / SEQUENCE * p[e] for e in range(config.num_experts))
            losses[time][row] = losses[time][row] + config.balance_coefficient * balance
    return torch.stack([torch.stack(rows) for rows in stream]), torch.stack([torch.stack(rows) for rows in losses])


def _double(parameters: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().double().requires_grad_() for name, parameter in parameters}


def test_layers_are_the_equations() -> None:
    layers = _layers(CONFIG)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator).requires_grad_()
    weight, loss_weight = (
        torch.randn(shape, generator=generator) for shape in ((SEQUENCE, BATCH, HIDDEN), (SEQUENCE, BATCH))
    )
    output, losses = _run(layers, hidden)
    cell = layers[0].shared[ROUTER_CELL]
    ours = {f"{i}.{name}": parameter for i, layer in enumerate(layers) for name, parameter in layer.named_parameters()}
    ours |= {f"cell.{name}": parameter for name, parameter in cell.named_parameters()} | {"hidden": hidden}
    found = torch.autograd.grad((output * weight).sum() + (losses * loss_weight).sum(), list(ours.values()))

    doubles = [_double(layer.named_parameters()) for layer in layers]
    double_cell, double_hidden = _double(cell.named_parameters()), hidden.detach().double().requires_grad_()
    expected_output, expected_losses = _by_equations(CONFIG, doubles, double_cell, double_hidden)
    theirs = {f"{i}.{name}": parameter for i, layer in enumerate(doubles) for name, parameter in layer.items()}
    theirs |= {f"cell.{name}": parameter for name, parameter in double_cell.items()} | {"hidden": double_hidden}
    expected = torch.autograd.grad(
        (expected_output * weight).sum() + (expected_losses * loss_weight).sum(), list(theirs.values())
    )
    assert_close(output, expected_output, OUTPUT_TOLERANCE, "output")
    assert_close(losses, expected_losses, OUTPUT_TOLERANCE, "losses")
    assert list(ours) == list(theirs)
    for name, one, other in zip(ours, found, expected, strict=True):
        assert other.abs().max() > 0, f"the gradient of {name} is zero and proves nothing"
        assert_close(one, other, GRADIENT_TOLERANCE, f"gradient of {name}")


def test_the_first_layer_learns_from_the_choices_of_the_last() -> None:
    """Through the state alone: what the first layer itself chooses is not asked."""
    layers = _layers(CONFIG.model_copy(update={"balance_coefficient": 0.0}))
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=torch.Generator().manual_seed(2))
    carried = initial_carried(hidden, layers[0].config.carried(HIDDEN))
    for layer in layers:
        before = carried[AUXILIARY_LOSS].detach()
        _, carried = layer(hidden, carried)
    last = (carried[AUXILIARY_LOSS] - before).sum()
    (slope,) = torch.autograd.grad(last, [layers[0].router.input_weight])
    assert slope.abs().max() > 1e-3


def test_metrics_count_every_token_and_begin_anew() -> None:
    layer = _layers(CONFIG)[0]
    assert layer.take_metrics() == {}
    generator = torch.Generator().manual_seed(3)
    logits = []
    layer.router.register_forward_hook(lambda module, inputs, outputs: logits.append(outputs[0].detach()))
    for length in (4, 9):
        hidden = torch.randn(length, BATCH, HIDDEN, generator=generator)
        layer(hidden, initial_carried(hidden, CONFIG.carried(HIDDEN)))
    found = layer.take_metrics()
    together = torch.cat([part.flatten(0, 1) for part in logits])
    p = together.softmax(-1)
    choices = torch.bincount(p.topk(2).indices.flatten(), minlength=4).double()
    assert found["moe_load"] == pytest.approx((choices.max() / choices.mean()).item())
    assert found["moe_entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)
    assert found["moe_z_loss"] == pytest.approx(together.logsumexp(-1).square().mean().item(), rel=1e-5)
    assert found["moe_dropped"] == 0
    assert found.keys() == MoE.METRICS.keys()
    assert layer.take_metrics() == {}


def test_even_loads_have_the_least_balance_loss() -> None:
    """One sequence that spreads its tokens evenly, and one that does not."""
    from pretrain.models.channel.moe.router import balance_loss, choices_per_sequence, route

    even = torch.eye(4).repeat(2, 1)
    lopsided = torch.eye(4)[[0]].repeat(8, 1)
    logits = 3 * torch.stack([even, lopsided], dim=1)
    routing = route(logits, 1, sequence_parallel=False)
    choices = choices_per_sequence(routing.experts, 4, sequence_parallel=False)
    assert choices.tolist() == [[2, 2, 2, 2], [8, 0, 0, 0]]
    losses = balance_loss(routing, choices, tokens=8).mean(dim=0)
    assert losses[0].item() == pytest.approx(1.0)
    assert losses[1].item() == pytest.approx(4 * routing.probabilities.max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_crosses_stages_stays_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 2, 8, generator=generator).to(dtype).requires_grad_()
    channels = {"a": 3, "b": 1}
    carried = {name: torch.randn(5, 2, size, generator=generator) for name, size in channels.items()}
    carried = {name: tensor.requires_grad_() for name, tensor in carried.items()}
    packed = pack(hidden, carried)
    assert packed.dtype == dtype and packed.shape == (5, 2, 8 + packed_channels(channels, dtype))
    # As it arrives on the next stage, whose backward pass sends the gradient of this very tensor.
    arrived = packed.detach().clone().requires_grad_()
    again, others = unpack(arrived, channels)
    assert torch.equal(again, hidden) and all(torch.equal(others[name], carried[name]) for name in channels)
    slopes = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in others.items()}
    loss = (again.float() ** 2).sum() + sum((others[name] * slopes[name]).sum() for name in channels)
    loss.backward()
    packed.backward(arrived.grad)
    assert torch.equal(hidden.grad, (2 * hidden).to(dtype))
    assert all(torch.equal(carried[name].grad, slopes[name]) for name in channels)


def test_nothing_is_packed_where_nothing_is_carried() -> None:
    hidden = torch.randn(3, 2, 4)
    assert pack(hidden, {}) is hidden
    again, carried = unpack(hidden, {})
    assert again is hidden and carried == {}


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("counts", [[5, 0, 17, 10], [0, 0, 3, 0], [8, 16, 0, 1], [0, 0, 0, 0]], ids=str)
def test_experts_at_once_are_experts_one_by_one(counts: list[int], recompute: str) -> None:
    """As a GPU runs them; also torch's kernel for the CPU refuses what is not aligned."""
    config = tiny_config(train={"recompute": recompute})
    build_topology(config)
    context = LayerContext(16, layer=0, num_layers=2, megatron=megatron_config(config))
    experts = Experts(MoEConfig(num_experts=4, intermediate_size=24), context)
    assert experts.can_work_at_once(torch.bfloat16) and not experts.can_work_at_once(torch.float32)
    assert not Experts(MoEConfig(num_experts=4, intermediate_size=20), context).can_work_at_once(torch.bfloat16)
    initialise_weights(experts, 0)
    generator = torch.Generator().manual_seed(1)
    rows, weight = (torch.randn(sum(counts), 16, generator=generator) for _ in range(2))
    results = []
    for run in (experts, experts.at_once):
        inputs = rows.clone().requires_grad_()
        output = run(inputs, torch.tensor(counts))
        found = torch.autograd.grad((output * weight).sum(), [inputs, *experts.parameters()])
        results.append([output, *found])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)


ROUTED = {"type": "moe", "num_experts": 4, "intermediate_size": 16, "router_size": 8}


STAGE = {"hidden_size": 32, "encoder": ["block0"], "decoder": ["block0", "block1"], "target_ratio": 4.0}
HIERARCHY = {"type": "hnet", "stages": [STAGE], "ratio_loss_weight": 0.03}


def _model(channel: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    blocks = {f"block{index}": {"channel": section} for index, section in enumerate((channel, *others))}
    return {"vocab_size": 264, "hidden_size": 32, "num_layers": len(blocks), "layers": list(blocks), "blocks": blocks}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": _model(ROUTED | {"experts_per_token": 5})}, "experts_per_token=5 is more than num_experts=4"),
        (
            {"model": _model(ROUTED, ROUTED | {"router_size": 16})},
            "blocks of layers carry one router_state from each to the next, but blocks.block0.channel gives it 8 "
            "channels and blocks.block1.channel 16; give both the same size",
        ),
        (
            {"model": _model(ROUTED | {"intermediate_size": 15}), "parallel": {"tensor": 2}},
            "model.blocks.block0.channel: intermediate_size=15 is not divisible by parallel.tensor=2",
        ),
        (
            {"model": _model(ROUTED | {"shared_expert_size": 15}), "parallel": {"tensor": 2}},
            "shared_expert_size=15 is not divisible by parallel.tensor=2",
        ),
        (
            {"model": _model(ROUTED), "parallel": {"expert": 3}},
            "model.blocks.block0.channel: its 4 experts are not divisible by parallel.expert=3",
        ),
        ({"parallel": {"expert": 2}}, "parallel.expert=2, but no block of the model has routed experts; set it to 1"),
        ({"model": _model(ROUTED), "parallel": {"expert": 2, "zero": 3}}, "zero=3 does not go with expert=2"),
        (
            {"model": _model(ROUTED, ROUTED | {"router_size": 16}) | {"layers": ["block1"], "hierarchy": HIERARCHY}},
            "blocks of hierarchy.stages.0.decoder carry one router_state from each to the next, but blocks.block0",
        ),
        ({"model": _model(ROUTED), "parallel": {"expert": 2, "data": 3}}, "data=3 is not divisible by expert=2"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    raw = tiny_config().model_dump(mode="json")
    with pytest.raises(InputError) as refused:
        parse_config({**raw, **sections}, "run.yaml")
    assert message in str(refused.value) and str(refused.value).startswith("run.yaml: ")


def test_processes_that_do_not_divide_are_refused() -> None:
    from pretrain.config.layout import check_world_size

    config = tiny_config(model=_model(ROUTED), parallel={"expert": 4})
    assert check_world_size(config, 4) is None
    refusal = check_world_size(config, 2)
    assert refusal.startswith("2 processes leave 2 data-parallel ranks, which parallel.expert=4 does not divide; start")
