"""Whether the machines of a job compute rightly, are about equally fast, and reach each other, before training starts.

Run on every node: ``python -m pretrain.node_check --processes N``. Each process multiplies two matrices of small whole
numbers on its device, of which every sum is known exactly, and takes the time; then all add up a tensor together. What
each found goes to the first process, which prints one line a node and names those that are wrong, missing or slow. It
needs no rank of its own to work: it waits for each to report, not for all to join.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist

from pretrain.observe.ending import say_ending

SLOW = 0.7
SECONDS_OF_PRODUCTS = 0.5
ELEMENTS_OF_SUM = 1 << 22


@dataclass(frozen=True)
class ProcessResult:
    """What one process found.

    Attributes:
        node: its host's name.
        problem: in one sentence; empty: none.
        flops_per_second: of its device's matrix products.
        sum_seconds: of adding up 16 MiB over all processes; None: it did not come to that.
    """

    node: str
    problem: str = ""
    flops_per_second: float = 0.0
    sum_seconds: float | None = None


def check_product(device: torch.device, size: int) -> tuple[str, float]:
    """A product of ``(size, size)`` matrices, compared by the sums of its rows and columns.

    Factors are -1, 0 and 1, of which at most 256 in a row are not 0, so that all is exact in bfloat16.

    Returns:
        What is wrong, or nothing, and FLOPs per second.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(size)
    left, right = (torch.randint(-1, 2, (size, size), generator=generator).double() for _ in range(2))
    place = torch.arange(size)
    left *= (place[:, None] - place) % -(-size // 256) == 0
    on_device = left.to(device, dtype), right.to(device, dtype)
    product = torch.matmul(*on_device)
    found = torch.cat([product.double().sum(0), product.double().sum(1)]).cpu()
    expected = torch.cat([left.sum(0) @ right, left @ right.sum(1)])
    wrong = int((found != expected).sum())
    if wrong:
        return f"{wrong} of {2 * size} sums of a matrix product are wrong", 0.0
    repeats, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS_OF_PRODUCTS:
        again = torch.matmul(*on_device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        repeats += 1
    seconds = (time.perf_counter() - start) / repeats
    if not torch.equal(again, product):
        return "the same matrix product came out different a second time", 0.0
    return "", 2 * size**3 / seconds


def check_sum(device: torch.device, rank: int, world_size: int) -> tuple[str, float]:
    """A tensor added up over all processes, of which the result is known; what is wrong, or nothing, and seconds."""
    tensor = torch.empty(ELEMENTS_OF_SUM, device=device)
    for _ in range(2):
        tensor.fill_(float(rank + 1))
        start = time.perf_counter()
        dist.all_reduce(tensor)
        first = tensor[0].item()
        seconds = time.perf_counter() - start
    if first != world_size * (world_size + 1) / 2 or bool((tensor != first).any()):
        return f"the sum over all processes is wrong: {first}", 0.0
    return "", seconds


def judge(results: Mapping[int, ProcessResult], nodes: Sequence[str], processes: int) -> tuple[list[str], list[str]]:
    """What is printed of each node, and what is wrong, in sentences that name it.

    Args:
        results: by rank, of those that have answered.
        nodes: their names in order, as far as they are known beforehand.
        processes: on each node.
    """
    speeds = [result.flops_per_second for result in results.values() if not result.problem]
    typical = median(speeds) if speeds else 0.0
    lines, problems = [], []
    for index, name in enumerate(nodes):
        ranks = range(index * processes, (index + 1) * processes)
        here = {rank: results[rank] for rank in ranks if rank in results}
        missing = [rank for rank in ranks if rank not in here]
        wrong = [f"node {name}, rank {rank}: {found.problem}" for rank, found in here.items() if found.problem]
        if missing:
            wrong.append(f"node {name}: no answer from rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}")
        problems += wrong
        sums = [found.sum_seconds for found in here.values() if found.sum_seconds is not None]
        slowest = min((found.flops_per_second for found in here.values()), default=0.0)
        line = f"node {name}: {slowest / 1e12:.3g} TFLOP/s"
        line += f", a sum of {ELEMENTS_OF_SUM * 4 >> 20} MiB over all {max(sums) * 1e3:.1f} ms" if sums else ""
        if not wrong and slowest < SLOW * typical:
            line += f", SLOW: the others reach {typical / 1e12:.3g}"
        lines.append(line + (", BROKEN" if wrong else ""))
    return lines, problems


class _Board:
    """Where processes leave what they found, for the first one to read."""

    def __init__(self, rank: int, world_size: int, seconds: float):
        self.rank, self.world_size, self.deadline = rank, world_size, time.monotonic() + seconds
        # Not waiting for the others: those that never come are to be named.
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]) + 1,
            None,
            is_master=rank == 0,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )

    def leave(self, stage: str, result: ProcessResult) -> None:
        self.store.set(f"{stage}/{self.rank}", json.dumps(asdict(result)))

    def collect(self, stage: str) -> dict[int, ProcessResult]:
        """Of all processes, or of those that have answered when time is up."""
        found: dict[int, ProcessResult] = {}
        while len(found) < self.world_size:
            for rank in range(self.world_size):
                if rank not in found and self.store.check([f"{stage}/{rank}"]):
                    found[rank] = ProcessResult(**json.loads(self.store.get(f"{stage}/{rank}")))
            if time.monotonic() > self.deadline:
                break
            time.sleep(0.05)
        return found

    def tell(self, stage: str, good: bool) -> None:
        self.store.set(f"{stage}/verdict", "good" if good else "bad")

    def hear(self, stage: str) -> bool:
        return self.store.get(f"{stage}/verdict") == b"good"


def check(rank: int, world_size: int, processes: int, seconds: float) -> int:
    """This process's part; returns an exit code."""
    local = rank % processes
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local % torch.cuda.device_count()) if gpu else torch.device("cpu")
    nodes = os.environ.get("PRETRAIN_NODES", "").split(",")
    if len(nodes) != world_size // processes:
        nodes = [str(index) for index in range(world_size // processes)]
    board = _Board(rank, world_size, seconds)
    try:
        problem, speed = check_product(device, 4096 if gpu else 512)
    except RuntimeError as error:
        problem, speed = " ".join(str(error).split())[:300], 0.0
    result = ProcessResult(socket.gethostname(), problem, speed)
    board.leave("product", result)
    if rank == 0:
        _, problems = judge(board.collect("product"), nodes, processes)
        board.tell("product", not problems)
    if not board.hear("product"):
        return _report(board.collect("product"), nodes, processes) if rank == 0 else 1
    try:
        if gpu:
            torch.cuda.set_device(device)
        store = dist.PrefixStore("sum", board.store)
        left = timedelta(seconds=max(1.0, board.deadline - time.monotonic()))
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=left)
        problem, taken = check_sum(device, rank, world_size)
        result = ProcessResult(result.node, problem, speed, None if problem else taken)
    except RuntimeError as error:
        result = ProcessResult(result.node, " ".join(str(error).split())[:300], speed)
    board.leave("sum", result)
    code = 0
    if rank == 0:
        code = _report(board.collect("sum"), nodes, processes)
        board.tell("sum", code == 0)
    elif not board.hear("sum"):
        code = 1
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    return code


def _report(results: Mapping[int, ProcessResult], nodes: Sequence[str], processes: int) -> int:
    lines, problems = judge(results, nodes, processes)
    for line in lines:
        print(line, flush=True)
    if not problems:
        return 0
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    say_ending("unhealthy", "; ".join(problems))
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """As a task of srun: checks this node's devices, one process each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="that this task starts, one for each device")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which what has not answered is broken")
    parser.add_argument("--rank", type=int, help="of one such process, which the task gives it")
    parser.add_argument("--per-node", type=int, help="processes on each node; by default those that this task starts")
    given = parser.parse_args(arguments)
    task, tasks = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    world_size, per_node = tasks * given.processes, given.per_node or given.processes
    if given.rank is not None or given.processes == 1:
        rank = task if given.rank is None else given.rank
        os.environ["RANK"] = str(rank)
        return check(rank, world_size, per_node, given.seconds)
    command = [sys.executable, "-m", "pretrain.node_check", *(arguments if arguments is not None else sys.argv[1:])]
    ranks = range(task * given.processes, (task + 1) * given.processes)
    running = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in ranks]
    return int(any([process.wait() for process in running]))


if __name__ == "__main__":
    # A process that waits for others that are gone would never end by itself.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
