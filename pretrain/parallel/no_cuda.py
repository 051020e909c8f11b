"""Megatron-core on the CPU.

Its schedules and its sequence parallelism ask for the current CUDA device, synchronise it, and make tensors
with ``device="cuda"``. For a process that computes on the CPU these three habits are turned to it; for one that
computes on CUDA nothing here does anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_bridged = False


def bridge_cuda_calls() -> None:
    """Makes this process a CPU process: the CUDA calls that Megatron-core makes unasked answer for the CPU."""
    global _bridged
    _bridged = True
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *arguments, **options: None


class _OnCPU(TorchFunctionMode):
    """Turns an explicit ``device="cuda"`` into the CPU."""

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not kwargs:
            return function(*args)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return function(*args, **kwargs)


@contextlib.contextmanager
def cuda_tensors_on_cpu() -> Iterator[None]:
    """Round a Megatron-core schedule: in a CPU process, tensors that it makes on "cuda" are made on the CPU."""
    if not _bridged:
        yield
        return
    with _OnCPU():
        yield
