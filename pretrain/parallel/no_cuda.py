"""Megatron-core on a machine without CUDA.

Its schedules and its sequence parallelism ask for the current CUDA device, synchronise it, and make tensors
with ``device="cuda"``. Where there is no CUDA these three habits are turned to the CPU; where there is, nothing
here does anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def bridge_cuda_calls() -> None:
    """Makes the two CUDA calls that Megatron-core makes unasked answer for the CPU. Safe to call twice."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *arguments, **options: None


class _OnCPU(TorchFunctionMode):
    """Turns an explicit ``device="cuda"`` into the CPU."""

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@contextlib.contextmanager
def cuda_tensors_on_cpu() -> Iterator[None]:
    """Round a Megatron-core schedule: tensors that it makes on "cuda" are made on the CPU without CUDA."""
    if torch.cuda.is_available():
        yield
        return
    with _OnCPU():
        yield
