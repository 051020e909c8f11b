"""While a segment's messages travel, forward and backward, a mixer makes the products that need none of them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from torch import Tensor

from kernels.segments import Arriving, Segments
from pretrain.models import linear
from tests.conformance.cases import Case, sequence_cases
from tests.conformance.tools import build, random_hidden
from tests.segment_threads import ThreadSegments, on_segments

CASES = {str(case): case for case in sequence_cases()}
# What each waits for last in the forward pass, and first in the backward pass, has a product in between.
NAMES = ["mlstm-0", "mlstm_pre_up-0", "mamba2-0", "attention-0", "para_gru-0", "para_lstm-0"]
HIDDEN = ["sent", "product", "waited"]


class Recorded(Arriving):
    """Writes down when it is waited for."""

    def __init__(self, arriving: Arriving, events: list[str]):
        super().__init__(arriving.wait())
        self.events = events
        events.append("sent")

    def wait(self) -> Tensor | None:
        self.events.append("waited")
        return super().wait()


class RecordingSegments(ThreadSegments):
    """Writes down what is sent and waited for."""

    def __init__(self, place: ThreadSegments, events: list[str]):
        super().__init__(place.rank, place.size, place.scheme, place.meeting)
        self.events = events

    def _all_gather(self, tensor: Tensor) -> Arriving:
        return Recorded(super()._all_gather(tensor), self.events)

    def _all_to_all(self, parts: Tensor) -> Arriving:
        return Recorded(super()._all_to_all(parts), self.events)

    def _send_and_receive(self, tensor: Tensor, target: int | None, source: int | None) -> Arriving:
        return Recorded(super()._send_and_receive(tensor, target, source), self.events)


def contains(events: list[str], pattern: list[str]) -> bool:
    length = len(pattern)
    return any(events[start : start + length] == pattern for start in range(len(events) - length + 1))


@pytest.mark.parametrize("name", NAMES)
def test_products_are_made_while_messages_travel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case: Case = CASES[name]
    recorded: dict[int, list[str]] = {}
    make_product = linear._CastColumnParallelLinear.forward_with

    def forward_with(self: object, hidden: Tensor, build_weight: Callable[[], Tensor]) -> Tensor:
        events = recorded[threading.get_ident()]
        product = make_product(self, hidden, build_weight)
        events.append("product")
        product.register_hook(lambda _: events.append("product"))
        return product

    monkeypatch.setattr(linear._CastColumnParallelLinear, "forward_with", forward_with)
    copies = [build(case) for _ in range(2)]
    hidden = random_hidden(case, 16, 2)

    def work(place: Segments) -> tuple[list[str], list[str]]:
        events = recorded.setdefault(threading.get_ident(), [])
        part = hidden[place.rank * 8 : place.rank * 8 + 8].clone().requires_grad_()
        output, _ = copies[place.rank](part, RecordingSegments(place, events), None)
        forward = list(events)
        events.clear()
        output.sum().backward()
        return forward, events

    for forward, backward in on_segments(2, "gather", work):
        assert contains(forward, HIDDEN), forward
        assert contains(backward, HIDDEN), backward
