"""Experts in hierarchies: routers of every network, their losses as losses of bytes, documents, pieces, parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.models.carried import initial_carried
from pretrain.models.channel.moe.config import MoEConfig
from pretrain.models.channel.moe.mixer import MoE
from pretrain.models.decoder import IGNORED_LABEL, Decoder
from pretrain.models.hierarchy.auxiliary import of_chunks
from pretrain.models.hierarchy.chunking import find_chunks
from pretrain.models.mixer import Documents
from pretrain.models.mixer_config import AUXILIARY_LOSS
from pretrain.plan import plan
from tests.configurations import tiny_config
from tests.models.expert_models import HIERARCHIES, expert_model, random_expert_model
from tests.models.hat_models import WORDS, random_words
from tests.models.hnet_models import random_bytes
from tests.models.test_hnet import first_only

LENGTH, BATCH = 40, 3
# The position of each byte, which is named by row and time.
Places = dict[tuple[int, int], int]
EVERY = pytest.mark.parametrize("hierarchy", HIERARCHIES)


def inputs(hierarchy: str, rows: int = BATCH) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, document starts, and word starts where they are read."""
    tokens = random_bytes(rows, LENGTH)
    starts = first_only(tokens)
    starts[-1, 13] = True
    return tokens, starts, random_words(starts, 4) if hierarchy == "hat" else None


def packed_logits(model: Decoder, tokens: Tensor, starts: Tensor, words: Tensor | None) -> Tensor:
    hidden, _, _ = model._blocks(model._embed(tokens), {}, None, Documents(starts, words), keep_states=False)
    return model._head(hidden).transpose(0, 1)


def places(model: Decoder, tokens: Tensor, starts: Tensor, words: Tensor | None) -> list[Places]:
    """For each level, from bytes inwards: the position, in the order of the row, that each byte belongs to."""
    rows, length = tokens.shape
    levels = [{(row, time): time * rows + row for row in range(rows) for time in range(length)}]
    masks = [words | starts] if words is not None else model.boundaries(tokens, starts)
    chunk, of_byte = -1, {}
    for row in range(rows):
        for time in range(length):
            chunk += bool(masks[0][row, time])
            of_byte[row, time] = chunk
    levels.append(of_byte)
    for mask in masks[1:]:
        coarser = (mask[0].long().cumsum(0) - 1).tolist()
        levels.append({byte: coarser[position] for byte, position in levels[-1].items()})
    return levels


def level_of(name: str) -> int:
    """Which positions a module of the model sees: 0 bytes, 1 chunks or words, 2 chunks of chunks."""
    if name.startswith("stages."):
        return int(name.split(".")[1])
    return -1 if name.startswith("layers.") else 0


def losses_by_equations(config: MoEConfig, logits: Tensor, place: Places) -> dict[tuple[int, int], Tensor]:
    """What one layer adds at each byte: the loss of the position that the byte is part of, in float64."""
    rows = logits.double().flatten(0, 1)
    p = rows.softmax(-1)
    sequence_of = {position: row for (row, _), position in place.items()}
    losses: dict[int, Tensor] = {}
    for sequence in set(sequence_of.values()):
        positions = [position for position, row in sequence_of.items() if row == sequence]
        chosen = torch.zeros(config.num_experts, dtype=torch.float64)
        for position in positions:
            chosen[p[position].topk(config.experts_per_token).indices] += 1
        for position in positions:
            balance = config.num_experts * (chosen / len(positions) * p[position]).sum()
            z = rows[position].logsumexp(-1).square()
            losses[position] = config.balance_coefficient * balance + config.z_coefficient * z
    return {byte: losses[position] for byte, position in place.items()}


@EVERY
def test_the_loss_of_a_label_is_that_of_every_position_its_byte_is_part_of(hierarchy: str) -> None:
    """Value at each byte, and gradients of the whole, against the equations written out byte by byte."""
    without_ratio_loss = {"hierarchy": HIERARCHIES["hnet"] | {"ratio_loss_weight": 0.0}} if hierarchy == "hnet" else {}
    model = random_expert_model(hierarchy, **without_ratio_loss)
    tokens, starts, words = inputs(hierarchy)
    levels = places(model, tokens, starts, words)
    sizes = [len(set(level.values())) for level in levels]
    assert sizes == sorted(set(sizes), reverse=True), "a level has as many positions as another"
    logits: dict[str, Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}

    def keep(name: str, output: Any) -> None:
        logits[name] = output[0] if isinstance(output, tuple) else output

    for name, layer in layers.items():
        layer.router.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    documents = Documents(starts, words)
    hidden, carried, _ = model._blocks(model._embed(tokens), {}, None, documents, keep_states=False)
    assert set(carried) == {AUXILIARY_LOSS}
    assert len(layers) == len(logits) == {"hnet": 11, "hat": 7}[hierarchy]
    parts = [losses_by_equations(layers[name].config, found, levels[level_of(name)]) for name, found in logits.items()]
    by_byte = [[sum(part[row, time] for part in parts) for row in range(BATCH)] for time in range(LENGTH)]
    expected = torch.stack([torch.stack(losses) for losses in by_byte])
    torch.testing.assert_close(carried[AUXILIARY_LOSS][..., 0].double(), expected, atol=1e-5, rtol=1e-5)

    generator = torch.Generator().manual_seed(1)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.4, IGNORED_LABEL)
    counts = labels != IGNORED_LABEL
    log_probabilities = model._head(hidden).double().log_softmax(-1)
    picked = log_probabilities.gather(-1, labels.where(counts, 0).t()[..., None])[..., 0]
    own = counts.t()
    reference = torch.autograd.grad(((expected - picked) * own).sum(), list(model.parameters()))
    loss = model(tokens, labels, starts, *([] if words is None else [words]))
    assert loss.item() == pytest.approx(-(picked * own).sum().item(), rel=1e-5), "what is logged is cross-entropy"
    loss.backward()
    for (name, parameter), gradient in zip(model.named_parameters(), reference, strict=True):
        # An expert that no chunk chose has none.
        scale = gradient.abs().max().clamp(min=1e-6)
        assert scale > 1e-6 or ".experts." in name, f"{name} has no gradient"
        torch.testing.assert_close(parameter.grad / scale, gradient / scale, atol=2e-4, rtol=0, msg=name)


@EVERY
def test_losses_reach_the_routers_and_the_cell_of_every_network(hierarchy: str) -> None:
    model = random_expert_model(hierarchy)
    tokens, starts, words = inputs(hierarchy)
    _, carried, _ = model._blocks(model._embed(tokens), {}, None, Documents(starts, words), keep_states=False)
    of_routers = ("router_cell.", ".channel.router.")
    routers = {name: value for name, value in model.named_parameters() if any(part in name for part in of_routers)}
    slopes = torch.autograd.grad(carried[AUXILIARY_LOSS].sum(), list(routers.values()))
    for name, slope in zip(routers, slopes, strict=True):
        assert slope.abs().max() > 1e-5, name


@EVERY
def test_packed_documents_are_documents_alone(hierarchy: str) -> None:
    model, lengths = random_expert_model(hierarchy), [11, 1, 17, 11]
    tokens = random_bytes(1, sum(lengths), seed=2)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True
    words = random_words(starts, 4) if hierarchy == "hat" else None
    weights = torch.randn(sum(lengths), 264, generator=torch.Generator().manual_seed(0))

    def gradients(logits: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        whole = torch.cat(logits)
        return whole.detach(), list(torch.autograd.grad((whole * weights).sum(), list(model.parameters())))

    pieces = [None] * len(lengths) if words is None else words.split(lengths, 1)
    packed, packed_gradients = gradients([packed_logits(model, tokens, starts, words)[0]])
    alone, alone_gradients = gradients(
        [
            packed_logits(model, piece, first_only(piece), part)[0]
            for piece, part in zip(tokens.split(lengths, 1), pieces, strict=True)
        ]
    )
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    for (name, _), gradient, expected in zip(model.named_parameters(), packed_gradients, alone_gradients, strict=True):
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradient / scale, expected / scale, atol=1e-4, rtol=0, msg=name)


@EVERY
@torch.no_grad()
def test_in_pieces_is_at_once(hierarchy: str) -> None:
    model = random_expert_model(hierarchy)
    tokens, starts, words = inputs(hierarchy)
    expected = packed_logits(model, tokens, starts, words)
    for size in (LENGTH, 1, 7):
        states, parts = None, []
        for first in range(0, LENGTH, size):
            piece = slice(first, first + size)
            read = None if words is None else words[:, piece]
            logits, states = model.logits(tokens[:, piece], states, starts[:, piece], read)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=5e-5, rtol=0)


@EVERY
def test_every_network_has_a_cell_of_its_own_and_the_plan_knows(hierarchy: str) -> None:
    config = tiny_config(model=expert_model(hierarchy), data=WORDS if hierarchy == "hat" else {})
    model = random_expert_model(hierarchy)
    cells = {name: value.shape[1] for name, value in model.named_parameters() if name.endswith("cell.state_weight")}
    outer = {
        "hnet": [f"stages.{stage}.{part}.shared" for stage in (0, 1) for part in ("encoder", "decoder")],
        "hat": ["encoder.shared", "decoder_shared"],
    }
    expected = {f"{place}.router_cell.state_weight": 8 for place in outer[hierarchy]}
    assert cells == {"shared.router_cell.state_weight": 12, **expected}
    estimate = plan(config, 1)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert estimate.parameters == estimate.stages[0].parameters == counted


def test_learning_rates_of_stages_are_those_of_their_cells() -> None:
    hierarchy = HIERARCHIES["hnet"] | {"inner_learning_rate_factor": 0.5}
    hierarchy["stages"] = [
        stage | {"learning_rate_factor": factor} for stage, factor in zip(hierarchy["stages"], (3.0, 2.0), strict=True)
    ]
    model = random_expert_model("hnet", hierarchy=hierarchy)
    for name, parameter in model.named_parameters():
        if ".router_cell." in f".{name}":
            expected = {-1: 0.5, 0: 3.0, 1: 2.0}[-1 if name.startswith("shared.") else level_of(name)]
            assert parameter.spec.learning_rate_factor == expected, name


def test_where_every_byte_is_a_chunk_losses_are_those_of_a_model_without_stages() -> None:
    """The same layers over the same positions: each word one byte long."""
    model = random_expert_model("hat")
    tokens, starts, _ = inputs("hat")
    hidden = torch.randn(LENGTH, BATCH, 64, generator=torch.Generator().manual_seed(0))
    channels = model.inner_channels
    _, expected, _ = Decoder._blocks(model, hidden, initial_carried(hidden, channels), None, Documents(starts), False)
    chunks = find_chunks(torch.ones_like(starts), starts, continues=False)
    row = chunks.row_of_documents(Documents(starts))
    assert row.sequence_lengths.tolist() == [LENGTH] * BATCH
    vectors = chunks.gather(hidden)[:, None]
    _, carried, _ = Decoder._blocks(model, vectors, initial_carried(vectors, channels, row), None, row, False)
    found = of_chunks(carried, chunks.latest)[AUXILIARY_LOSS]
    torch.testing.assert_close(found, expected[AUXILIARY_LOSS], atol=1e-5, rtol=1e-5)
