"""``bench kernels``: what the Triton kernels compile to for GPUs that need not be present."""

from __future__ import annotations

from rich.console import Console

from kernels.compile import TARGETS, compile_launch, format_table, registered_launches
from pretrain.errors import InputError


def print_compiled_kernels() -> None:
    """Compiles every kernel for every target, with a line of progress for each, and prints the table.

    Raises:
        InputError: the environment cannot compile (the interpreter is on, or a tool of triton's is missing).
    """
    console, progress = Console(), Console(stderr=True)
    launches = registered_launches()
    progress.print(f"compiling {len(launches)} kernels for {', '.join(TARGETS)}; about a minute when first run")
    rows = []
    for index, launch in enumerate(launches, 1):
        progress.print(f"{index} of {len(launches)}: {launch.kernel.__name__}")
        for target in TARGETS:
            try:
                rows.append(compile_launch(launch, target))
            except RuntimeError as error:
                raise InputError(f"{launch.kernel.__name__} for {target}: {error}") from error
    console.print(format_table(rows), soft_wrap=True, highlight=False)
