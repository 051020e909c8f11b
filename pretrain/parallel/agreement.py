"""Ranks that decide together: one runs, all learn the outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from data.errors import DataError
from pretrain.errors import InputError, TrainingError

Result = TypeVar("Result")


def on_main_rank(function: Callable[[], Result]) -> Result:
    """Runs ``function`` on rank 0 and returns what it returned on every rank.

    Raises:
        InputError, DataError, TrainingError: on every rank, where rank 0 raised it.
    """
    outcome: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (InputError, DataError, TrainingError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def on_every_rank(function: Callable[[], None]) -> None:
    """Runs ``function``, which must not communicate, on every rank; where one fails, all raise its error.

    Raises:
        InputError, DataError, TrainingError: the first, by rank, that was raised.
    """
    error = None
    try:
        function()
    except (InputError, DataError, TrainingError) as raised:
        error = raised
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for raised in errors:
        if raised is not None:
            raise raised


def together(function: Callable[[], Result], device: torch.device) -> Result:
    """What ``function``, which must not communicate, returned on this rank; where one rank fails, all raise its error.

    While nothing fails this costs one small message, and so can be used in every step.

    Raises:
        InputError, DataError, TrainingError: the first, by rank, that was raised.
    """
    results: list[Result] = []
    error: Exception | None = None
    try:
        results.append(function())
    except (InputError, DataError, TrainingError) as raised:
        error = raised
    if any_rank(error is not None, device):
        on_every_rank(lambda: _raise(error))
    return results[0]


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on at least one rank; the same answer everywhere."""
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def combine_ranks(
    values: Mapping[str, float | tuple[float, int]], reductions: Mapping[str, str], device: torch.device
) -> dict[str, float]:
    """Each figure's sum, mean or largest value over all ranks, by name; a NaN among values of which the
    largest is asked comes out as infinity.

    Args:
        values: of this rank, with the names of ``reductions``; of what is averaged, sum and number of values.
        reductions: name -> ``"sum"``, ``"mean"`` or ``"max"``; the same names in the same order on every rank.
    """
    means = [name for name, reduction in reductions.items() if reduction == "mean"]
    combined = {}
    if means:
        sums = torch.tensor([values[name] for name in means], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        combined |= {name: total / max(count, 1) for name, (total, count) in zip(means, sums.tolist(), strict=True)}
    for kind, operation in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX)):
        names = [name for name, reduction in reductions.items() if reduction == kind]
        if names:
            # The largest of numbers and a NaN depends on the backend; infinity wins everywhere.
            own = [math.inf if kind == "max" and math.isnan(values[name]) else values[name] for name in names]
            tensor = torch.tensor(own, dtype=torch.float64, device=device)
            dist.all_reduce(tensor, op=operation)
            combined |= dict(zip(names, tensor.tolist(), strict=True))
    return combined
