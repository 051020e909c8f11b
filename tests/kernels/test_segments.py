"""States before segments: what several ranks find together is what one rank finds alone, gradients too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from kernels.conv1d import causal_conv1d
from kernels.conv1d import segments as conv1d_segments
from kernels.mlstm import mlstm
from kernels.mlstm import segments as mlstm_segments
from kernels.segments import PartsTold, Segments, weighted_outer_sum
from kernels.ssd import segments as ssd_segments
from kernels.ssd import ssd
from tests.segment_threads import on_segments

BATCH, HEADS = 2, 4


def mlstm_inputs(length: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, length, HEADS, *shape, generator=generator, dtype=torch.float64)

    return normal(3), normal(3), normal(5), 3 * normal(), 2 * normal() + 1


def run_mlstm(segments: Segments | None, starts: Tensor, query, key, value, inputs, forget) -> Tensor:
    state = None
    if segments is not None:
        state = mlstm_segments.start_exchange(segments, key, value, inputs, forget, starts)()
    return mlstm(query, key, value, inputs, forget, initial_state=state, document_starts=starts, chunk_size=4)[0]


def ssd_inputs(length: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, length, *shape, generator=generator, dtype=torch.float64)

    return normal(HEADS, 3), normal(HEADS), normal(2, 5), normal(2, 5)


def run_ssd(segments: Segments | None, starts: Tensor, values, step, keys, queries) -> Tensor:
    rate, step = -torch.linspace(0.1, 1.0, HEADS, dtype=torch.float64), softplus(step)
    state = None
    if segments is not None:
        state = ssd_segments.start_exchange(segments, values, step, rate, keys, starts)()
    return ssd(values, step, rate, keys, queries, initial_state=state, document_starts=starts, chunk_size=4)[0]


def conv1d_inputs(length: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, length, 3, generator=generator, dtype=torch.float64),)


def run_conv1d(segments: Segments | None, starts: Tensor, inputs: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    state = None
    if segments is not None:
        state = conv1d_segments.start_exchange(segments, inputs, 4, starts)()
    return causal_conv1d(inputs, weight, initial_state=state, document_starts=starts, activation="silu")[0]


OPERATIONS = {"mlstm": (mlstm_inputs, run_mlstm), "ssd": (ssd_inputs, run_ssd), "conv1d": (conv1d_inputs, run_conv1d)}


def document_starts(length: int, size: int, seed: int) -> Tensor:
    """Two rows: documents anywhere, several in a segment, at an edge; and one that goes through all segments."""
    starts = torch.zeros(BATCH, length, dtype=torch.bool)
    starts[:, 0] = True
    starts[0] |= torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.15
    starts[0, length // size] = True
    return starts


def gradients(run: Callable[..., Tensor], segments: Segments | None, starts: Tensor, inputs, seed: Tensor):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = run(segments, starts, *leaves)
    return output.detach(), torch.autograd.grad(output, leaves, seed)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("scheme", ["gather", "scan"])
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_segments_are_one_sequence(operation: str, scheme: str, size: int) -> None:
    make, run = OPERATIONS[operation]
    length, generator = 6 * size, torch.Generator().manual_seed(size)
    inputs, starts = make(length, generator), document_starts(length, size, size)
    whole = run(None, starts, *inputs)
    cotangent = torch.randn(whole.shape, generator=generator, dtype=whole.dtype)
    expected = gradients(run, None, starts, inputs, cotangent)

    def work(segments: Segments):
        part = slice(segments.rank * 6, segments.rank * 6 + 6)
        own = [tensor[:, part] for tensor in inputs]
        return gradients(run, segments, starts[:, part], own, cotangent[:, part])

    results = on_segments(size, scheme, work)
    joined = torch.cat([output for output, _ in results], dim=1)
    torch.testing.assert_close(joined, expected[0], rtol=1e-10, atol=1e-10)
    for index, of_whole in enumerate(expected[1]):
        of_parts = torch.cat([found[index] for _, found in results], dim=1)
        torch.testing.assert_close(of_parts, of_whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9])
def test_traffic_is_what_the_formulas_say(size: int) -> None:
    words = 10

    def work(segments: Segments) -> dict[str, tuple[int, int]]:
        part = torch.randn(words, dtype=torch.float64, requires_grad=True)
        (before,) = PartsTold([part], lambda earlier, later: (earlier[0] + later[0],), segments).before()
        before.sum().backward()
        return {kind: (count, segments.traffic.bytes[kind]) for kind, count in segments.traffic.messages.items()}

    for found in on_segments(size, "gather", work):
        each = (size - 1, (size - 1) * words * 8)
        assert found == {"gather": each, "sum": each}
    # The last rank has most to receive in the forward pass; the first ones have in the backward pass.
    rounds = 1 + max(size - 2, 0).bit_length()
    messages = [found.get("shift", (0, 0))[0] for found in on_segments(size, "scan", work)]
    assert max(messages) <= 2 * rounds and messages[0] == 1
    assert sum(messages) == 2 * sum(size - first - distance for first, distance in _pairs(size))


def _pairs(size: int) -> list[tuple[int, int]]:
    """The first sender and the distance of each round."""
    return [(0, 1)] + [(1, 1 << power) for power in range(max(size - 2, 0).bit_length())]


def test_segments_too_short_for_a_convolution_are_refused() -> None:
    with pytest.raises(ValueError, match="a segment of 2 tokens is shorter than the 3"):
        on_segments(2, "gather", lambda segments: run_conv1d(segments, None, torch.randn(BATCH, 2, 3)))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_weighted_sum_of_outer_products(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    weights, left, right = normal(2, 6, 4), normal(2, 6, 4, 3), normal(2, 6, groups, 5)
    found = weighted_outer_sum(weights, left, right)
    expected = torch.einsum("bth,bthr,bthc->bhrc", weights, left, right.repeat_interleave(4 // groups, dim=2))
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found, (weights, left, right), cotangent),
        torch.autograd.grad(expected, (weights, left, right), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
