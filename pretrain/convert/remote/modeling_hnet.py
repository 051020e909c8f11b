"""H-Net for ``transformers``: stages that choose their own chunks (Hwang et al. 2025, arXiv 2507.07955)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.modeling import NORMS, empty_parameter

from .block_stack import BlockStack, NamedStates
from .configuration_recurrent import RecurrentConfig
from .modeling_recurrent import RecurrentForCausalLM, initial_carried
from .recurrent_cache import States


class Router(nn.Module):
    """``p_t = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2``, and 1 at the first position of all."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.query_weight = empty_parameter(hidden_size, hidden_size)
        self.key_weight = empty_parameter(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """Probabilities ``(batch, sequence)`` float32 for ``(batch, sequence, hidden_size)``.

        ``previous`` is the vector before these, ``(batch, hidden_size)``; None where there is none.
        """
        first = hidden[:, :1] if previous is None else previous[:, None].to(hidden.dtype)
        query = nn.functional.linear(torch.cat([first, hidden[:, :-1]], 1), self.query_weight).float()
        key = nn.functional.linear(hidden, self.key_weight).float()
        similarity = (nn.functional.normalize(query, dim=-1) * nn.functional.normalize(key, dim=-1)).sum(-1)
        probability = (0.5 - 0.5 * similarity).clamp(0.0, 1.0)
        if previous is None:
            begins = torch.zeros_like(probability, dtype=torch.bool)
            begins[:, 0] = True
            probability = probability.masked_fill(begins, 1.0)
        return probability


class Residual(nn.Module):
    """``W x`` in float32."""

    float32_parameters = ("weight",)

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = empty_parameter(hidden_size, hidden_size)

    def forward(self, encoded: Tensor) -> Tensor:
        """Maps ``(..., hidden_size)`` to the same shape, float32."""
        return nn.functional.linear(encoded.float(), self.weight.float())


class Padding(nn.Module):
    """Learned channels behind those of a narrower stage."""

    def __init__(self, size: int):
        super().__init__()
        self.channels = empty_parameter(size)

    def forward(self, vectors: Tensor) -> Tensor:
        """Maps ``(..., width)`` to ``(..., width + size)``."""
        return torch.cat([vectors, self.channels.to(vectors.dtype).expand(*vectors.shape[:-1], -1)], dim=-1)


class HNetStage(nn.Module):
    """An encoder whose output is chunked, and a decoder of what comes back for the chunks."""

    def __init__(self, config: RecurrentConfig, stage: dict[str, Any], inner_size: int, has_norm: bool):
        super().__init__()
        self.hidden_size = stage["hidden_size"]
        self.encoder = BlockStack(config, stage["encoder"], self.hidden_size, True)
        self.router = Router(self.hidden_size)
        self.residual = Residual(self.hidden_size)
        self.decoder = BlockStack(config, stage["decoder"], self.hidden_size, has_norm)
        self.widen = Padding(inner_size - self.hidden_size) if inner_size > self.hidden_size else nn.Identity()


def join_rows(states: Sequence[NamedStates]) -> NamedStates:
    """States of several batches as those of one; in front of the shorter of tensors that grow there are zeros."""
    joined: NamedStates = {}
    for name, first in states[0].items():
        joined[name] = None if first is None else {}
        for key in first or {}:
            tensors = [of_batch[name][key] for of_batch in states]
            sizes = [max(each) for each in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
            missing = [[most - size for most, size in zip(sizes, t.shape[1:], strict=True)] for t in tensors]
            padded = [
                nn.functional.pad(tensor, [edge for amount in reversed(amounts) for edge in (amount, 0)])
                for tensor, amounts in zip(tensors, missing, strict=True)
            ]
            joined[name][key] = torch.cat(padded)
    return joined


def select_rows(states: NamedStates, rows: Tensor) -> NamedStates:
    """The states of some sequences of a batch."""
    return {
        name: None if state is None else {key: tensor[rows] for key, tensor in state.items()}
        for name, state in states.items()
    }


class HNetForCausalLM(RecurrentForCausalLM):
    """Embedding, stages round the layers, norm, head."""

    def _make_further_modules(self) -> None:
        config = self.config
        stages = config.hierarchy["stages"]
        sizes = [stage["hidden_size"] for stage in stages] + [config.hidden_size]
        self.inner_norm = NORMS[config.norm](config.hidden_size, config.norm_epsilon)
        self.stages = nn.ModuleList(
            HNetStage(config, stage, sizes[index + 1], has_norm=index > 0) for index, stage in enumerate(stages)
        )
        # Caches hold lists.
        self.state_names = [str(layer) for layer in range(len(self.layers))]
        for index, stage in enumerate(stages):
            for part in ("encoder", "decoder"):
                self.state_names += [f"stages.{index}.{part}.{block}" for block in range(len(stage[part]))]
            self.state_names += [f"stages.{index}.router", f"stages.{index}.dechunk"]

    @property
    def residual_streams(self) -> int:
        """Only what the head reads has the embedding's width and length."""
        return 1

    def _blocks(self, hidden: Tensor, states: States | None) -> tuple[list[Tensor], States]:
        named = None if states is None else dict(zip(self.state_names, states, strict=True))
        output, final = self._from_stage(0, hidden, named)
        return [hidden, output], [final[name] for name in self.state_names]

    def _from_stage(self, index: int, hidden: Tensor, states: NamedStates | None) -> tuple[Tensor, NamedStates]:
        """Stage ``index`` with all that stands further in; behind the last one that are the layers."""
        if index == len(self.stages):
            final: NamedStates = {}
            carried = initial_carried(hidden, self.layers)
            for layer, block in enumerate(self.layers):
                state = None if states is None else states[str(layer)]
                hidden, final[str(layer)], carried = block(hidden, state, carried)
            return self.inner_norm(hidden), final
        stage, name = self.stages[index], f"stages.{index}"
        encoded, _, final = stage.encoder(hidden, states, f"{name}.encoder")
        probability = stage.router(encoded, None if states is None else states[f"{name}.router"]["previous"])
        chosen = probability > 0.5
        confidence = torch.where(chosen, probability, 1.0 - probability)[..., None]

        smoothed = torch.zeros_like(encoded, dtype=torch.float32)
        averages, order, finals = [], [], []
        counts = chosen.sum(1)
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            before = None if states is None else select_rows(states, rows)
            found, average, after = self._chunks(index, encoded[rows], probability[rows], chosen[rows], count, before)
            smoothed = smoothed.index_put((rows,), found)
            averages.append(average)
            order.append(rows)
            finals.append(after)
        places = torch.cat(order).argsort()
        final |= select_rows(join_rows(finals), places)
        final[f"{name}.router"] = {"previous": encoded[:, -1].float()}
        final[f"{name}.dechunk"] = {"average": torch.cat(averages)[places]}
        # Forward the confidence is 1; training goes through it (Bengio et al. 2013, arXiv 1308.3432).
        passed = confidence + (1.0 - confidence).detach()
        decoded = (smoothed * passed + stage.residual(encoded)).to(encoded.dtype)
        output, _, decoder_final = stage.decoder(decoded, states, f"{name}.decoder")
        return output, final | decoder_final

    def _chunks(
        self,
        index: int,
        encoded: Tensor,
        probability: Tensor,
        chosen: Tensor,
        count: int,
        states: NamedStates | None,
    ) -> tuple[Tensor, Tensor, NamedStates]:
        """What stands within stage ``index``, for sequences that each have ``count`` chunks in this call.

        Returns:
            The smoothed vector of each position's chunk, ``(batch, sequence, hidden_size)`` float32; the average
            after the last one; and the states of what stands further in.
        """
        stage, batch = self.stages[index], len(encoded)
        if states is None:
            average, inner_states = encoded.new_zeros(batch, stage.hidden_size, dtype=torch.float32), None
        else:
            average = states[f"stages.{index}.dechunk"]["average"]
            inner_states = {key: state for key, state in states.items() if not key.startswith(f"stages.{index}.")}
        found = [average]
        if count:
            vectors = encoded[chosen].unflatten(0, (batch, count))
            inner, inner_states = self._from_stage(index + 1, stage.widen(vectors), inner_states)
            weights = probability[chosen].view(batch, count, 1)
            for weight, vector in zip(
                weights.unbind(1), inner[..., : stage.hidden_size].float().unbind(1), strict=True
            ):
                average = weight * vector + (1.0 - weight) * average
                found.append(average)
        places = chosen.cumsum(1)[..., None].expand(-1, -1, stage.hidden_size)
        return torch.stack(found, 1).gather(1, places), average, inner_states
