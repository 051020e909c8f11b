"""Routing, chunking, smoothing and the ratio loss against loops over bytes written from the equations, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.models.hierarchy.chunking import find_chunks
from pretrain.models.hierarchy.hnet.dechunking import dechunk
from pretrain.models.hierarchy.hnet.ratio_loss import ratio_loss
from pretrain.models.hierarchy.hnet.routing import Boundaries, Router, choose, straight_through
from pretrain.parallel.topology import build_topology
from tests.configurations import tiny_config

ROWS, LENGTH, SIZE = 3, 23, 6


def router() -> Router:
    build_topology(tiny_config())
    made = Router(SIZE).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        noise = 0.3 * torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
        parameter.data.copy_(torch.eye(SIZE, dtype=torch.float64) + noise)
    return made


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Encoder outputs, document starts, what came before: the vector and the average; weights of a random loss."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    starts = torch.rand(ROWS, LENGTH, generator=generator) < 0.1
    # One sequence goes on where it was, one begins with a document.
    starts[0, 0], starts[1, 0] = False, True
    hidden, before, average = normal(LENGTH, ROWS, SIZE), normal(ROWS, SIZE), normal(ROWS, SIZE)
    return hidden.requires_grad_(), starts, before.requires_grad_(), average.requires_grad_(), normal(2, LENGTH, SIZE)


def inner(vectors: Tensor, weight: Tensor) -> Tensor:
    """Stands for the network between chunking and smoothing; works on each chunk by itself."""
    return torch.tanh(vectors @ weight)


def by_parts(
    made: Router, weight: Tensor, hidden: Tensor, starts: Tensor | None, before: Tensor | None, average: Tensor | None
) -> tuple[Tensor, Tensor, Boundaries]:
    boundaries = choose(made(hidden, before, starts))
    chunks = find_chunks(boundaries.chosen, starts, continues=before is not None)
    smoothed, after = dechunk(inner(chunks.gather(hidden), weight), boundaries.probability, chunks, average)
    return smoothed * straight_through(boundaries.confidence).t()[..., None], after, boundaries


def by_loop(
    made: Router, weight: Tensor, hidden: Tensor, starts: Tensor, before: Tensor | None, average: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Byte after byte, sequence after sequence."""
    outputs, finals, probabilities, chosen = [], [], [], []
    for row in range(hidden.shape[1]):
        value = None if average is None else average[row]
        for position in range(len(hidden)):
            vector = hidden[position, row]
            previous = hidden[position - 1, row] if position else (None if before is None else before[row])
            if starts[row, position] or previous is None:
                probability = torch.ones((), dtype=torch.float64)
                value = inner(vector, weight)
                is_boundary = True
            else:
                query, key = made.query_weight @ previous, made.key_weight @ vector
                probability = (1 - query @ key / (query.norm() * key.norm())) / 2
                is_boundary = bool(probability > 0.5)
                if is_boundary:
                    value = probability * inner(vector, weight) + (1 - probability) * value
            confidence = probability if is_boundary else 1 - probability
            outputs.append(value * (1 + confidence - confidence.detach()))
            probabilities.append(probability)
            chosen.append(is_boundary)
        finals.append(value)
    shape = (hidden.shape[1], len(hidden))
    return (
        torch.stack(outputs).view(*shape, -1).transpose(0, 1),
        torch.stack(finals),
        torch.stack(probabilities).view(shape),
        torch.tensor(chosen).view(shape),
    )


@pytest.mark.parametrize("continues", [False, True])
def test_outputs_and_gradients_are_those_of_a_loop_over_bytes(continues: bool) -> None:
    made = router()
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    hidden, starts, before, average, weights = inputs()
    carried = (before, average) if continues else (None, None)
    leaves = [hidden, weight, *made.parameters(), *(carried if continues else ())]

    smoothed, after, boundaries = by_parts(made, weight, hidden, starts, *carried)
    expected, expected_after, probability, chosen = by_loop(made, weight, hidden, starts, *carried)
    assert 0.2 < chosen.double().mean() < 0.8
    assert torch.equal(boundaries.chosen, chosen)
    torch.testing.assert_close(boundaries.probability.double(), probability, atol=1e-12, rtol=0)
    torch.testing.assert_close(smoothed, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(after, expected_after, atol=1e-12, rtol=0)

    def gradients(outputs: Tensor, final: Tensor, chance: Tensor) -> tuple[Tensor, ...]:
        loss = (outputs * weights[0][:, None]).sum() + (final * weights[1][:ROWS]).sum() + (chance**2).sum()
        return torch.autograd.grad(loss, leaves)

    found = gradients(smoothed, after, boundaries.probability)
    for gradient, wanted in zip(found, gradients(expected, expected_after, probability), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(gradient, wanted, atol=1e-10, rtol=0)


def test_calls_that_hand_on_the_state_are_one_pass() -> None:
    made, weight = router(), torch.eye(SIZE, dtype=torch.float64)
    hidden, starts, before, average, _ = inputs(5)
    whole, after, _ = by_parts(made, weight, hidden, starts, before, average)
    # Single positions too, at some of which no sequence begins a chunk.
    for sizes in ([1] * LENGTH, [9, 1, 13]):
        parts, value, previous, place = [], average, before, 0
        for size in sizes:
            piece = slice(place, place + size)
            part, value, _ = by_parts(made, weight, hidden[piece], starts[:, piece], previous, value)
            parts.append(part)
            previous, place = hidden[place + size - 1], place + size
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=0)
        torch.testing.assert_close(value, after, atol=1e-12, rtol=0)


def test_equal_neighbours_make_no_chunk_and_opposite_ones_do() -> None:
    build_topology(tiny_config())
    made = Router(SIZE)
    for parameter in made.parameters():
        parameter.data.copy_(torch.eye(SIZE))
    vector = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    hidden = torch.stack([vector, vector, -vector, -2 * vector, vector])[:, None]
    boundaries = choose(made(hidden, None, None))
    assert boundaries.chosen.tolist() == [[True, False, True, False, True]]
    torch.testing.assert_close(boundaries.probability, torch.tensor([[1.0, 0, 1, 0, 1]]), atol=1e-6, rtol=0)
    assert boundaries.confidence.min() > 0.99


def test_a_row_of_chunks_says_where_each_belongs() -> None:
    chosen = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 0, 1], [1, 0, 0, 0, 0]]).bool()
    starts = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 1], [1, 0, 0, 0, 0]]).bool()
    chunks = find_chunks(chosen, starts, continues=False)
    assert chunks.counts.tolist() == [2, 3, 1]
    assert chunks.offsets.tolist() == [0, 2, 5]
    assert chunks.row.tolist() == [0, 0, 1, 1, 1, 2]
    assert chunks.position.tolist() == [0, 3, 0, 1, 4, 0]
    assert chunks.begins_document.tolist() == [True, False, True, False, True, True]
    assert chunks.begins_sequence.tolist() == [True, False, True, False, False, True]
    assert chunks.latest.tolist() == [[0, 0, 0, 1, 1], [2, 3, 3, 3, 4], [5] * 5]
    later = find_chunks(chosen.flip(1), None, continues=True)
    assert later.latest.tolist() == [[-1, 0, 0, 0, 1], [2, 2, 2, 3, 4], [-1, -1, -1, -1, 5]]
    assert not later.begins_document.any()


@pytest.mark.parametrize("target", [2.0, 6.0])
def test_ratio_loss_is_least_at_its_target(target: float) -> None:
    assert ratio_loss(torch.tensor(1 / target), torch.tensor(1 / target), target) == pytest.approx(1.0)
    for fraction in (0.01, 0.5 / target, 1.3 / target, 0.99):
        value = torch.tensor(fraction)
        assert ratio_loss(value, value, target) > 1.001
        # The gradient draws the probability down where there are too many chunks, and up where there are too few.
        probability = torch.tensor(fraction, requires_grad=True)
        ratio_loss(value, probability, target).backward()
        assert (probability.grad > 0) == (fraction > 1 / target)
