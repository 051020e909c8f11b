"""Ranks that decide together: one runs, all learn the outcome."""

from __future__ import annotations

from collections.abc import Callable
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


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on at least one rank; the same answer everywhere."""
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
