"""Mamba-2 in torch alone, for exported models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.modeling import GroupedRMSNorm, Projections, State, causal_convolution, empty_parameter

# Parts of the convolved channels.
CONVOLVED = ("value", "key", "query")


def state_space_dual(
    values: Tensor,
    step_size: Tensor,
    decay_rate: Tensor,
    keys: Tensor,
    queries: Tensor,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The SSD recurrence, quadratic within chunks (Dao and Gu 2024, arXiv 2405.21060, section 6).

    Args:
        values: ``(batch, sequence, heads, size)``.
        step_size: ``(batch, sequence, heads)`` positive.
        decay_rate: ``(heads,)`` negative.
        keys, queries: ``(batch, sequence, groups, state size)``; heads share them by groups.
        state: ``(batch, heads, size, state size)`` before the first token.
        chunk_size: tokens read at once.

    Returns:
        ``(batch, sequence, heads, size)``, and the state after the last token; float32.
    """
    heads = values.shape[2]
    keys, queries = (
        tensor.float().repeat_interleave(heads // tensor.shape[2], 2).transpose(1, 2) for tensor in (keys, queries)
    )
    values, step_size = values.float().transpose(1, 2), step_size.float().transpose(1, 2)
    log_decay = step_size * decay_rate[:, None]
    outputs = []
    chunks = (tensor.split(chunk_size, 2) for tensor in (values, step_size, log_decay, keys, queries))
    for v, step, decay, k, q in zip(*chunks, strict=True):
        length = v.shape[2]
        ones = torch.ones(length, length, dtype=torch.bool, device=v.device)
        # Sums of decays between two tokens, not differences of sums, which would lose digits.
        between = decay[..., :, None].expand(*decay.shape, length).masked_fill(~ones.tril(-1), 0.0).cumsum(-2)
        weights = torch.exp(between.masked_fill(ones.triu(1), -torch.inf)) * step[..., None, :]
        carried = torch.exp(decay.cumsum(-1))
        outputs.append((q @ k.mT * weights) @ v + carried[..., None] * (q @ state.mT))
        state = carried[..., -1, None, None] * state + (v * weights[..., -1, :, None]).mT @ k
    return torch.cat(outputs, 2).transpose(1, 2), state


class Mamba2(nn.Module):
    """``output(group_norm((H q + skip x) * silu(z)))`` per head (Dao and Gu 2024, arXiv 2405.21060, section 7)."""

    float32_parameters = (
        *(f"{name}_convolution_{kind}" for name in CONVOLVED for kind in ("weight", "bias")),
        "log_decay_rate",
        "step_size_bias",
        "skip",
    )

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_size: int,
        state_size: int,
        num_groups: int,
        convolution_width: int,
        convolution_bias: bool,
        gate_bias: bool,
        norm_epsilon: float,
        chunk_size: int,
    ):
        super().__init__()
        self.head_size, self.state_size, self.chunk_size = head_size, state_size, chunk_size
        inner, keys = num_heads * head_size, num_groups * state_size
        sizes = {"gate": inner, "value": inner, "key": keys, "query": keys, "step_size": num_heads}
        self.projections = Projections(hidden_size, sizes)
        for name in CONVOLVED:
            weight = empty_parameter(sizes[name], convolution_width)
            self.register_parameter(f"{name}_convolution_weight", weight)
            bias = empty_parameter(sizes[name]) if convolution_bias else None
            self.register_parameter(f"{name}_convolution_bias", bias)
        self.log_decay_rate = empty_parameter(num_heads)
        self.step_size_bias = empty_parameter(num_heads)
        self.skip = empty_parameter(num_heads)
        self.gate_bias = empty_parameter(inner) if gate_bias else None
        self.norm = GroupedRMSNorm(inner, num_groups, norm_epsilon)
        self.output = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, hidden: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Maps ``(batch, sequence, hidden_size)`` to the same shape, from one state to the next."""
        gate, *parts, step = self.projections(hidden)
        convolved, final = [], {}
        for name, part in zip(CONVOLVED, parts, strict=True):
            outputs, final[f"{name}_convolution"] = causal_convolution(
                part,
                getattr(self, f"{name}_convolution_weight"),
                getattr(self, f"{name}_convolution_bias"),
                None if state is None else state[f"{name}_convolution"],
            )
            convolved.append(nn.functional.silu(outputs).to(hidden.dtype))
        values = convolved[0].unflatten(-1, (-1, self.head_size))
        keys, queries = (channels.unflatten(-1, (-1, self.state_size)) for channels in convolved[1:])
        if state is None:
            matrix = values.new_zeros(len(values), *values.shape[2:], self.state_size, dtype=torch.float32)
        else:
            matrix = state["matrix"]
        outputs, final["matrix"] = state_space_dual(
            values,
            nn.functional.softplus(step.float() + self.step_size_bias.float()),
            -torch.exp(self.log_decay_rate.float()),
            keys,
            queries,
            matrix,
            self.chunk_size,
        )
        outputs = outputs + self.skip.float()[:, None] * values.float()
        gate = gate.float() if self.gate_bias is None else gate.float() + self.gate_bias.float()
        gated = outputs.flatten(2) * nn.functional.silu(gate)
        return self.output(self.norm(gated).to(hidden.dtype)), final


MODELING = Mamba2
