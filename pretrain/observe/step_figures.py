"""Figures of single blocks and layers on the steps that ask for them: gradients, updates, gates, states.

Their names are ``FIGURE/BLOCK``, for instance ``grad_norm/layers.3`` or ``forget_gate/layers.3``: all that is measured
of one figure stands together. Every rank takes part, whatever it holds; each element of a parameter is counted by
exactly one rank, so that the squares of all blocks add up to that of the whole in every layout.
"""

from __future__ import annotations

import math
import re

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pretrain.config.observe import ObserveConfig
from pretrain.models.mixer import SequenceMixer
from pretrain.models.state_figures import StateFigures
from pretrain.parallel.engine import Engine
from pretrain.parallel.topology import Topology

_BLOCK = re.compile(r"(.*?layers\.[0-9]+)\.")


def block_of(parameter: str) -> str:
    """The block that a parameter of this name belongs to; of those outside of blocks the module: ``embedding``."""
    found = _BLOCK.match(parameter)
    return found.group(1) if found else parameter.rsplit(".", 1)[0]


class StepFigures:
    """What one rank measures of its part, and what comes out over all of them.

    A step calls :meth:`begin` before its forward passes, :meth:`before_update` when gradients are there,
    :meth:`after_update` when weights have changed; on steps that are not looked at they do nothing.

    Args:
        config: None: no step is looked at.
    """

    def __init__(self, config: ObserveConfig | None, engine: Engine, topology: Topology) -> None:
        self.config, self.engine, self.topology = config, engine, topology
        self._is_due = False
        self._blocks: list[str] | None = None
        # Of this rank's share of each parameter, in the engine's order.
        self._weights: dict[str, Tensor] = {}
        # (blocks, 3): squared norms of gradient, weight and update.
        self._squares: Tensor | None = None

    def begin(self, step: int) -> None:
        """Step ``step``, counted from 1, begins."""
        self._is_due = self.config is not None and step % self.config.every == 0
        if self._is_due and self.config.states:
            segments = parallel_state.get_context_parallel_world_size()
            has_ends = parallel_state.get_context_parallel_rank() == segments - 1
            for module in self.engine.decoder.modules():
                if isinstance(module, SequenceMixer):
                    module.figures = StateFigures(has_ends)

    def before_update(self) -> None:
        """Gradients are complete; every rank calls this."""
        if not self._is_due or not self.config.per_block:
            return
        self._squares = torch.zeros(len(self._all_blocks()), 3, dtype=torch.float64, device=self.topology.device)
        for name in self.engine.parameters:
            row = self._squares[self._blocks.index(block_of(name))]
            row[0] += _square(self._share(name, self.engine.read_gradient(name)))
            weight = self._share(name, self.engine.read_state(name, "weight"))
            self._weights[name] = weight.clone()
            row[1] += _square(weight)

    def after_update(self) -> dict[str, float]:
        """What was measured in this step, over all ranks, which all call this."""
        if not self._is_due:
            return {}
        found: dict[str, float] = {}
        if self.config.per_block:
            found |= self._figures_of_blocks()
        if self.config.states:
            found |= self._figures_of_states()
        return found

    def _all_blocks(self) -> list[str]:
        """Blocks of all stages, in the model's order as far as numbers say."""
        if self._blocks is None:
            self._blocks = self._on_all_ranks({block_of(name) for name in self.engine.parameters})
        return self._blocks

    def _on_all_ranks(self, names: set[str]) -> list[str]:
        everyone: list[set[str]] = [set()] * self.topology.world_size
        dist.all_gather_object(everyone, names)
        return sorted(set().union(*everyone), key=_in_order)

    def _share(self, name: str, tensor: Tensor | None) -> Tensor:
        """This rank's part of what it has of a parameter in common with others; empty where it counts elsewhere."""
        spec, topology = self.engine.parameters[name].spec, self.topology
        if tensor is None or spec.pipeline_copy or (spec.shard_dimension is None and topology.tensor_rank != 0):
            return torch.zeros(0, device=topology.device)
        rank, size = topology.copy_rank, topology.copy_size
        if spec.expert:
            rank, size = topology.expert_data_rank, topology.expert_data_size
        flat = tensor.detach().reshape(-1)
        return flat[flat.numel() * rank // size : flat.numel() * (rank + 1) // size]

    def _figures_of_blocks(self) -> dict[str, float]:
        for name in self.engine.parameters:
            weight = self._share(name, self.engine.read_state(name, "weight"))
            self._squares[self._blocks.index(block_of(name)), 2] += _square(weight - self._weights.pop(name))
        dist.all_reduce(self._squares)
        squares, self._squares = self._squares, None
        found = {"update_ratio": _ratio(*squares.sum(0)[1:].tolist())}
        for block, (gradient, weight, update) in zip(self._blocks, squares.tolist(), strict=True):
            found[f"grad_norm/{block}"] = math.sqrt(gradient)
            found[f"update_ratio/{block}"] = _ratio(weight, update)
        return found

    def _figures_of_states(self) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        largest: dict[str, Tensor] = {}
        for name, module in self.engine.decoder.named_modules():
            if isinstance(module, SequenceMixer) and module.figures is not None:
                layer = name.removesuffix(".mixer")
                sums |= {f"{figure}/{layer}": value for figure, value in module.figures.sums.items()}
                largest |= {f"{figure}/{layer}": value for figure, value in module.figures.largest.items()}
                module.figures = None
        # Which layers there are, other stages need not know; and whether one had anything to say may differ.
        names = self._on_all_ranks({*sums, *largest})
        device = self.topology.device
        table = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
        tops = torch.full((len(names),), -math.inf, dtype=torch.float64, device=device)
        for place, name in enumerate(names):
            if name in sums:
                table[place] = sums[name]
            if name in largest:
                # The largest of numbers and a NaN depends on the backend; infinity wins everywhere.
                tops[place] = largest[name].nan_to_num(nan=math.inf, posinf=math.inf)
        dist.all_reduce(table)
        dist.all_reduce(tops, op=dist.ReduceOp.MAX)
        return {
            name: top if top > -math.inf else total / max(count, 1.0)
            for name, (total, count), top in zip(names, table.tolist(), tops.tolist(), strict=True)
        }


def _square(tensor: Tensor) -> Tensor:
    return tensor.double().square().sum()


def _ratio(weight: float, update: float) -> float:
    """Norm of the update over that of the weight, from their squares; 0 where there is no weight."""
    return math.sqrt(update / weight) if weight > 0 else 0.0


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sorts numbers within names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]
