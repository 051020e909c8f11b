"""Causal attention in torch alone, for exported models."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pretrain.models.modeling import Projections, State, empty_parameter

NAMES = ("query", "key", "value")


def frequencies(size: int, base: float, scaling: dict[str, float] | None) -> Tensor:
    """Radians per token of each pair, ``(size / 2,)``; ``scaling`` makes long wavelengths longer, as Llama 3.1 does."""
    found = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if scaling is None:
        return found
    low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
    kept = ((scaling["original_context"] * found / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
    return found * (kept + (1.0 - kept) / scaling["factor"])


def rotate(heads: Tensor, positions: Tensor, size: int, base: float, scaling: dict[str, float] | None) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) in a head's first ``size`` channels.

    Channels that lie half of ``size`` apart are a pair.

    Args:
        heads: ``(batch, sequence, heads, channels)``.
        positions: ``(batch, sequence)``.
        size: even.
        base: of the wavelengths.
        scaling: of the wavelengths; None leaves them.
    """
    angles = positions.float()[..., None, None] * frequencies(size, base, scaling).to(heads.device)
    cosines, sines = angles.cos(), angles.sin()
    first, second = heads[..., :size].chunk(2, -1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return torch.cat([*(part.to(heads.dtype) for part in turned), heads[..., size:]], -1)


class Attention(nn.Module):
    """Attention with grouped queries, rotary positions, a window, a norm of queries and keys, each where asked for."""

    float32_parameters = ("query_norm_weight", "key_norm_weight")

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_key_value_heads: int,
        head_size: int,
        rotary_size: int,
        rotary_base: float,
        sliding_window: int | None,
        softmax_scale: float,
        query_key_norm: bool,
        norm_epsilon: float,
        bias: bool,
        output_bias: bool,
        rotary_scaling: dict[str, float] | None,
    ):
        super().__init__()
        self.head_size, self.rotary_size, self.rotary_base = head_size, rotary_size, rotary_base
        self.rotary_scaling = rotary_scaling
        self.sliding_window, self.softmax_scale, self.norm_epsilon = sliding_window, softmax_scale, norm_epsilon
        counts = dict(zip(NAMES, (num_heads, num_key_value_heads, num_key_value_heads), strict=True))
        sizes = {name: count * head_size for name, count in counts.items()}
        self.projections = Projections(hidden_size, sizes)
        self.output = nn.Linear(num_heads * head_size, hidden_size, bias=False)
        for name, size in sizes.items():
            self.register_parameter(f"{name}_bias", empty_parameter(size) if bias else None)
        self.register_parameter("output_bias", empty_parameter(hidden_size) if output_bias else None)
        for name in NAMES[:2]:
            self.register_parameter(f"{name}_norm_weight", empty_parameter(head_size) if query_key_norm else None)

    def _heads(self, name: str, projected: Tensor) -> Tensor:
        """``(batch, sequence, heads, head_size)`` before rotation."""
        bias = getattr(self, f"{name}_bias")
        heads = (projected if bias is None else projected + bias).unflatten(-1, (-1, self.head_size))
        weight = getattr(self, f"{name}_norm_weight", None)
        if weight is None:
            return heads
        normed = nn.functional.rms_norm(heads.float(), weight.shape, weight.float(), self.norm_epsilon)
        return normed.to(projected.dtype)

    def forward(self, hidden: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Maps ``(batch, sequence, hidden_size)`` to the same shape, from one state to the next.

        The state is the keys, rotated, and values that later tokens may see, and how many tokens were read: only so
        many of the last keys count, so that sequences of different lengths can share a batch.
        """
        batch, length = hidden.shape[:2]
        query, key, value = map(self._heads, NAMES, self.projections(hidden))
        read = hidden.new_zeros(batch, dtype=torch.float32) if state is None else state["position"]
        positions = read[:, None] + torch.arange(length, device=hidden.device)
        if self.rotary_size:
            size, base, scaling = self.rotary_size, self.rotary_base, self.rotary_scaling
            query, key = (rotate(heads, positions, size, base, scaling) for heads in (query, key))
        kept = {"key": key.float(), "value": value.float()}
        if state is not None:
            kept = {name: torch.cat([state[name], rows], 1) for name, rows in kept.items()}
        keys, values = (kept[name].to(hidden.dtype).transpose(1, 2) for name in ("key", "value"))

        # Every query's own key is among the last `length`.
        own = torch.arange(keys.shape[2] - length, keys.shape[2], device=hidden.device)[:, None]
        back = own - torch.arange(keys.shape[2], device=hidden.device)
        visible = (back >= 0) & (back <= positions[..., None])
        if self.sliding_window is not None:
            visible = visible & (back < self.sliding_window)
        mixed = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, attn_mask=visible[:, None], scale=self.softmax_scale, enable_gqa=True
        )
        output = self.output(mixed.transpose(1, 2).flatten(2))
        if self.output_bias is not None:
            output = output + self.output_bias

        if self.sliding_window is not None:
            first = max(0, keys.shape[2] - self.sliding_window + 1)
            kept = {name: rows[:, first:] for name, rows in kept.items()}
        return output, kept | {"position": read + length}


MODELING = Attention
