"""What tensor-parallel and expert-parallel ranks tell each other in one layer, from configurations alone.

Imports no torch. Megatron-core's mappings send most of it (``megatron.core.tensor_parallel``); ``tests/plan`` counts
the calls beside these formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FLOAT32 = 4

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"]


@dataclass(frozen=True)
class TensorMessage:
    """One collective call of a layer.

    Attributes:
        collective: its kind.
        bytes: per position of the whole sequence: of the tensor that is reduced, gathered (whole), scattered (whole)
            or sent from; of ``all_to_all`` one rank's.
        backward: whether it belongs to the backward pass.
        group: whose ranks take part.
    """

    collective: Collective
    bytes: float
    backward: bool = False
    group: Literal["tensor", "expert"] = "tensor"


def split_projections(
    config: object, hidden_size: int, bytes_per_element: int, tensor: int, sequence: bool
) -> list[TensorMessage]:
    """Of a layer that begins with a column-parallel and ends with a row-parallel product, as most do.

    Args:
        config: of the mixer.
        hidden_size: width that it reads and writes.
        bytes_per_element: of activations.
        tensor: tensor-parallel ranks, at least 2.
        sequence: whether each holds a part of the sequence between layers.
    """
    size = float(hidden_size * bytes_per_element)
    if not sequence:
        # The output's sum; the sum of the input's gradient.
        return [TensorMessage("all_reduce", size), TensorMessage("all_reduce", size, backward=True)]
    return [
        TensorMessage("all_gather", size),
        TensorMessage("reduce_scatter", size),
        # Of the output's gradient; of the input once more, for the weights' gradient; the input's gradient.
        TensorMessage("all_gather", size, backward=True),
        TensorMessage("all_gather", size, backward=True),
        TensorMessage("reduce_scatter", size, backward=True),
    ]


def summed_inside(count: int) -> list[TensorMessage]:
    """Of ``count`` float32 numbers a position that ranks add up and all go on with, forward and backward."""
    size = float(FLOAT32 * count)
    return [TensorMessage("all_reduce", size), TensorMessage("all_reduce", size, backward=True)]


def said_again(messages: Sequence[TensorMessage]) -> list[TensorMessage]:
    """What a block sends when the backward pass computes it again.

    Torch stops as soon as all is there that the backward pass reads: before the sum of the block's output, but behind
    what comes back from experts, which is still multiplied.
    """
    forward = [message for message in messages if not message.backward]
    return forward[:-1] if forward and forward[-1].group == "tensor" else forward
