"""How a native class's tensors are made from our parameters, and how parts agree on its fields."""

from __future__ import annotations

import pytest
import torch

from pretrain.convert.native import assemble
from pretrain.models.hugging_face import Piece, pieces_of_tensors

PLACES = {
    "up": Piece("both.weight", 1),
    "gate": Piece("both.weight", 0),
    "down": "down.weight",
    "window": Piece("conv.weight", unsqueeze=1),
    "optional": "optional.bias",
}


def test_tensors_are_put_together_in_order() -> None:
    parameters = {
        "up": torch.randn(3, 2),
        "down": torch.randn(2, 3),
        "gate": torch.randn(4, 2),
        "window": torch.randn(5, 4),
    }
    pieces = pieces_of_tensors(PLACES, parameters)
    assert list(pieces) == ["both.weight", "down.weight", "conv.weight"]
    tensors = {name: assemble(parameters, parts) for name, parts in pieces.items()}
    assert torch.equal(tensors["both.weight"], torch.cat([parameters["gate"], parameters["up"]]))
    assert torch.equal(tensors["down.weight"], parameters["down"])
    assert torch.equal(tensors["conv.weight"], parameters["window"][:, None])


def test_a_parameter_without_a_place_and_two_in_one() -> None:
    with pytest.raises(ValueError, match="'bias' has no name there"):
        pieces_of_tensors(PLACES, ["up", "bias"])
    with pytest.raises(ValueError, match="up, down have one place in 'down.weight'"):
        pieces_of_tensors(PLACES | {"up": "down.weight"}, ["up", "down"])
