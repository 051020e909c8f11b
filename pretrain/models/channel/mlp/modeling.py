"""MLP in torch alone, for exported models."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.models.modeling import Projections


def relu_squared(inputs: Tensor) -> Tensor:
    """``max(x, 0)^2`` (So et al. 2021, arXiv 2109.08668)."""
    return nn.functional.relu(inputs).square()


ACTIVATIONS = {"relu_squared": relu_squared, "gelu": nn.functional.gelu, "silu": nn.functional.silu}


class MLP(nn.Module):
    """``down(activation(up(x)))``, or gated, ``down(activation(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, *, inner_size: int, activation: str, gated: bool):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        names = ("gate", "up") if gated else ("up",)
        self.projections = Projections(hidden_size, dict.fromkeys(names, inner_size))
        self.down = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(..., hidden_size)`` to the same shape."""
        first, *others = self.projections(hidden)
        activated = self.activation(first)
        for other in others:
            activated = activated * other
        return self.down(activated)


MODELING = MLP
