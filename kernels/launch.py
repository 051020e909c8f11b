"""One Triton launch as a value: what to run, on which grid, with which arguments.

Kernels are launched through `Launch` so that the very launches that run on a device can also be compiled
ahead of time (`python -m kernels.compile`), from tensors on the `meta` device and without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it needs.

    Attributes:
        kernel: the function decorated with `triton.jit`.
        grid: number of programs along up to three axes.
        arguments: run-time arguments by name: tensors, ints and floats.
        constants: compile-time (`tl.constexpr`) arguments by name.
        num_warps: warps of 32 threads per program.
        num_stages: depth of the software pipeline of loops that load.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1

    def options(self) -> dict[str, Any]:
        """Compiler options. Fusing multiplications with additions is asked for because its default varies."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Run the kernel on the device its tensors are on (on the CPU under Triton's interpreter)."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options())


Executor = Callable[[Launch], None]


def execute(launch: Launch) -> None:
    """Run a launch; the default executor of every function that launches kernels."""
    launch.run()


def interpreter_is_active() -> bool:
    """Whether kernels run in Triton's interpreter: `TRITON_INTERPRET=1` was set when it was imported."""
    return isinstance(tl.zeros, InterpretedFunction)


def check_device(tensor: torch.Tensor, what: str) -> None:
    """Refuse tensors that no kernel can reach.

    Raises:
        ValueError: if the tensor is on the CPU and the interpreter is not active.
    """
    if tensor.device.type == "cpu" and not interpreter_is_active():
        raise ValueError(
            f"{what} is on the CPU, where Triton kernels run only in the interpreter: move it to a GPU, "
            "set TRITON_INTERPRET=1 before triton is imported, or use the torch implementation."
        )
