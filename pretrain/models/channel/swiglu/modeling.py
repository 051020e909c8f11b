"""SwiGLU in torch alone, for exported models."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.models.modeling import Projections


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, *, inner_size: int):
        super().__init__()
        self.projections = Projections(hidden_size, {"gate": inner_size, "up": inner_size})
        self.down = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(..., hidden_size)`` to the same shape."""
        gate, up = self.projections(hidden)
        return self.down(nn.functional.silu(gate) * up)


MODELING = SwiGLU
