"""Where chunks begin: where a position is unlike the one before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from pretrain.models.parameters import ParameterSpec, identity, new_parameter


@dataclass(frozen=True)
class Boundaries:
    """What a router decided for each position.

    Attributes:
        probability: ``(batch, sequence)`` float32, that a chunk begins there.
        chosen: ``(batch, sequence)`` bool, whether one does: where the probability is above one half.
    """

    probability: Tensor
    chosen: Tensor

    @property
    def confidence(self) -> Tensor:
        """Probability of what was chosen, ``(batch, sequence)``; never below one half."""
        return torch.where(self.chosen, self.probability, 1.0 - self.probability)


def choose(probability: Tensor) -> Boundaries:
    """The boundaries that a router's probabilities mean, the same on all tensor-parallel ranks."""
    return Boundaries(probability, _of_first_tensor_rank(probability > 0.5))


def straight_through(values: Tensor) -> Tensor:
    """Ones, with the gradient of ``values`` (Bengio et al. 2013, arXiv 1308.3432)."""
    return values + (1.0 - values).detach()


class Router(nn.Module):
    """Probability of a boundary from cosine similarity (Hwang et al. 2025, arXiv 2507.07955, equation 4)::

        p_t = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2

    At the first token of a document p_t = 1, whatever came before. Both maps start as the identity. Every
    tensor-parallel rank holds both whole.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        for name in ("query", "key"):
            weight = new_parameter((hidden_size, hidden_size), ParameterSpec(identity))
            self.register_parameter(f"{name}_weight", weight)

    def forward(self, hidden: Tensor, previous: Tensor | None, starts: Tensor | None) -> Tensor:
        """Probabilities ``(batch, sequence)`` float32 that a chunk begins.

        Args:
            hidden: ``(sequence, batch, hidden_size)``, the encoder's output.
            previous: ``(batch, hidden_size)``, the encoder's output at the position before these; None where
                there is none, and a chunk begins at the first.
            starts: ``(batch, sequence)`` bool, first tokens of documents; None: none here.
        """
        first = hidden[:1] if previous is None else previous[None].to(hidden.dtype)
        query = nn.functional.linear(torch.cat([first, hidden[:-1]]), self.query_weight.to(hidden.dtype))
        key = nn.functional.linear(hidden, self.key_weight.to(hidden.dtype))
        similarity = _normalised(query).mul(_normalised(key)).sum(-1)
        probability = (0.5 - 0.5 * similarity).clamp(0.0, 1.0).t()
        begins = torch.zeros_like(probability, dtype=torch.bool) if starts is None else starts.clone()
        if previous is None:
            begins[:, 0] = True
        return probability.masked_fill(begins, 1.0)


def _normalised(vectors: Tensor) -> Tensor:
    """Vectors of length one, at least float32."""
    return nn.functional.normalize(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=-1)


def _of_first_tensor_rank(chosen: Tensor) -> Tensor:
    """The same choice on all tensor-parallel ranks, of which each sums activations in an order of its own."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return chosen
    shared = chosen.to(torch.uint8).contiguous()
    source = parallel_state.get_tensor_model_parallel_src_rank()
    dist.broadcast(shared, source, group=parallel_state.get_tensor_model_parallel_group())
    return shared.bool()
