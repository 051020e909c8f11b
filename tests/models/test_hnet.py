"""H-Net as a whole: causal to the byte, packed documents apart, and the same however a text is cut into calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.models.hierarchy.hnet.model import HNet
from pretrain.models.mixer import Documents
from tests.models.hnet_models import random_bytes, random_hnet

LENGTH = 40
STAGES = pytest.mark.parametrize("stages", [1, 2])


def packed_logits(model: HNet, tokens: Tensor, starts: Tensor) -> Tensor:
    """As in training: the chunks of all sequences in one row."""
    hidden, _, _ = model._blocks(model._embed(tokens), {}, None, Documents(starts), keep_states=False)
    return model._head(hidden).transpose(0, 1)


def first_only(tokens: Tensor) -> Tensor:
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    return starts


@STAGES
def test_every_parameter_gets_a_gradient(stages: int) -> None:
    model = random_hnet(stages)
    tokens = random_bytes(3, LENGTH)
    model(tokens, tokens, first_only(tokens)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-7, name


@STAGES
@torch.no_grad()
def test_stepwise_is_teacher_forcing_for_rows_that_chunk_at_different_times(stages: int) -> None:
    model = random_hnet(stages)
    tokens = random_bytes(3, LENGTH)
    starts = first_only(tokens)
    starts[1, 13] = True
    expected = packed_logits(model, tokens, starts)
    counts = model.boundaries(tokens, starts)[0].sum(1)
    assert len(set(counts.tolist())) > 1, "every row has as many chunks"
    for size in (LENGTH, 1, 7):
        states, parts = None, []
        for piece, begins in zip(tokens.split(size, 1), starts.split(size, 1), strict=True):
            logits, states = model.logits(piece, states, begins)
            parts.append(logits)
        # Rounding of another order of sums, through a few blocks.
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=5e-5, rtol=0)


@STAGES
@torch.no_grad()
def test_no_output_depends_on_a_later_byte_or_on_another_row(stages: int) -> None:
    model = random_hnet(stages)
    tokens = random_bytes(3, LENGTH)
    starts = first_only(tokens)
    expected, chosen = packed_logits(model, tokens, starts), model.boundaries(tokens, starts)[0]
    changed_chunks = 0
    for position in (7, 18, 30):
        changed = tokens.clone()
        changed[1, position] = 250
        logits = packed_logits(model, changed, starts)
        torch.testing.assert_close(logits[1, :position], expected[1, :position], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=0)
        assert (logits[1, position:] - expected[1, position:]).abs().amax(-1).min() > 1e-4
        changed_chunks += not torch.equal(model.boundaries(changed, starts)[0], chosen)
    assert changed_chunks, "no change moved a boundary, so nothing of that was tested"


@STAGES
def test_packed_documents_are_documents_alone(stages: int) -> None:
    model = random_hnet(stages)
    lengths = [11, 1, 17, 11]
    tokens = random_bytes(1, sum(lengths), seed=2)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True
    weights = torch.randn(sum(lengths), 264, generator=torch.Generator().manual_seed(0))

    def gradients(logits: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        whole = torch.cat(logits)
        model.zero_grad()
        (whole * weights).sum().backward()
        return whole.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    packed, packed_gradients = gradients([packed_logits(model, tokens, starts)[0]])
    alone, alone_gradients = gradients(
        [packed_logits(model, piece, first_only(piece))[0] for piece in tokens.split(lengths, 1)]
    )
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    for (name, _), gradient, expected in zip(model.named_parameters(), packed_gradients, alone_gradients, strict=True):
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradient / scale, expected / scale, atol=1e-4, rtol=0, msg=name)


@torch.no_grad()
def test_first_weights_pass_chunks_on_and_keep_the_residual_out() -> None:
    from pretrain.models.parameters import initialise_weights

    model = random_hnet(2)
    initialise_weights(model, 0)
    for stage in model.stages:
        torch.testing.assert_close(stage.router.query_weight, torch.eye(stage.hidden_size))
        torch.testing.assert_close(stage.router.key_weight, torch.eye(stage.hidden_size))
        assert not stage.residual.weight.any()
        assert not stage.widen.channels.any()
