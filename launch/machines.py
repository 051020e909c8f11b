"""The torchrun command of each machine."""

from __future__ import annotations

from collections.abc import Sequence

# Longer than a checkpoint takes: torchrun kills what is still saving when it is over.
SHUTDOWN_SECONDS = 1800


def local_command(python: str, processes: int, program: Sequence[str]) -> list[str]:
    """Starts ``program`` (arguments of Python) in so many processes on this machine, on a port that is free."""
    options = ["--standalone", "--nproc-per-node", str(processes), "--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    return [python, "-m", "torch.distributed.run", *options, *program]


def node_commands(
    python: str, nodes: int, processes: int, address: str, port: int, program: Sequence[str]
) -> list[list[str]]:
    """One command for each of several machines; the first machine is the one that the others reach at ``address``."""
    return [
        [
            *(python, "-m", "torch.distributed.run"),
            *("--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", str(processes)),
            *("--master-addr", address, "--master-port", str(port)),
            *("--shutdown-timeout", str(SHUTDOWN_SECONDS)),
            *program,
        ]
        for node in range(nodes)
    ]
