"""Segments of a sequence on several ranks, for mixers that exchange what is before them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.segments import Segments
from pretrain.models.mixer import Documents
from pretrain.models.segment_messages import SegmentTraffic, exchanged
from pretrain.models.state_figures import StateFigures
from tests.conformance.cases import Case
from tests.conformance.checks import random_starts
from tests.conformance.tools import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    assert_all_close,
    assert_close,
    assert_every_parameter_matters,
    build,
    gradients,
    random_hidden,
    weighted_sum,
)
from tests.segment_threads import on_segments


def segments(case: Case, size: int, scheme: str, has_documents: bool) -> None:
    """Ranks that each call the mixer with a segment have the outputs and gradients of one call, by as many messages as
    its costs say."""
    mixer, *copies = [build(case) for _ in range(size + 1)]
    each = 7
    hidden = random_hidden(case, size * each, 3).requires_grad_()
    starts = random_starts(case, size * each) if has_documents else None
    output, _ = mixer(hidden, None, None if starts is None else Documents(starts))
    expected = gradients(weighted_sum(case, {"output": output}), mixer, {"hidden": hidden})
    assert_every_parameter_matters(mixer, expected)
    (cotangent,) = torch.autograd.grad(weighted_sum(case, {"output": output}), output)

    def work(place: Segments) -> tuple[Tensor, dict[str, Tensor], SegmentTraffic]:
        own, here = copies[place.rank], slice(place.rank * each, (place.rank + 1) * each)
        part = hidden[here].detach().clone().requires_grad_()
        documents = None if starts is None else Documents(starts[:, here])
        mixed, _ = own(part, place, documents)
        found = gradients((mixed * cotangent[here]).sum(), own, {"hidden": part})
        received = SegmentTraffic(place.traffic.messages.total(), place.traffic.bytes.total())
        return mixed.detach(), found, received

    outputs, found, received = zip(*on_segments(size, scheme, work), strict=True)
    assert_close(torch.cat(outputs), output, OUTPUT_TOLERANCE, "output")
    config, figures = case.config, copies[0].take_metrics()
    if "newton_iterations" in figures:
        assert figures["newton_fallbacks"] == 0, "shooting takes messages of its own"
        config = config.model_copy(update={"newton_iterations": int(figures["newton_iterations"])})
    messages = case.family.segment_messages(config, case.hidden_size, each, 4)
    expected_traffic = exchanged(messages, scheme, size)
    assert sum(received, SegmentTraffic(0, 0)) == SegmentTraffic(expected_traffic.messages, 3 * expected_traffic.bytes)
    joined = {name: sum(part[name] for part in found) for name, _ in mixer.named_parameters()}
    joined["hidden"] = torch.cat([part["hidden"] for part in found])
    # Sums over segments round once more; kernels/test_segments.py compares the exchange itself in float64.
    assert_all_close(joined, expected, 2 * GRADIENT_TOLERANCE, "gradient")


def figures_of_segments(case: Case, size: int, scheme: str) -> None:
    """Gates and states that ranks measure add up to those of one call."""
    mixer, *copies = [build(case) for _ in range(size + 1)]
    each = 5
    hidden, starts = random_hidden(case, size * each, 3), random_starts(case, size * each)
    # One segment at least goes on with a document of the segment before, whose state its gates see.
    starts[:, each] = False
    mixer.figures = StateFigures()
    mixer(hidden, None, Documents(starts))

    def work(place: Segments) -> StateFigures:
        own, here = copies[place.rank], slice(place.rank * each, (place.rank + 1) * each)
        own.figures = StateFigures(has_ends=place.rank == size - 1)
        own(hidden[here], place, Documents(starts[:, here]))
        return own.figures

    found = on_segments(size, scheme, work)
    for name, expected in mixer.figures.sums.items():
        total = sum(part.sums[name] for part in found if name in part.sums)
        assert_close(total, expected, OUTPUT_TOLERANCE, name)
        assert expected[0].abs() > 1e-3
    for name, expected in mixer.figures.largest.items():
        (largest,) = [part.largest[name] for part in found if name in part.largest]
        assert_close(largest, expected, OUTPUT_TOLERANCE, name)
