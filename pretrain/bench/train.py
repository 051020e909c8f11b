"""Tokens per second of a forward and backward, in rounds that take turns with the xlstm package's.

Other load on a machine comes and goes within seconds. So each round times every contestant once, one after
the other, and what is compared is the ratio within a round; its median over the rounds is what counts.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from pretrain.bench.contestants import (
    SQUARE,
    SQUARE_REPEATS,
    Contestant,
    PeerMissing,
    Workload,
    matrix_products,
    our_model,
    our_step,
    peer_model,
    peer_step,
    product_shapes,
)
from pretrain.plan import model_flops_per_token


@dataclass(frozen=True)
class Measurement:
    """One row.

    Attributes:
        name: of the row.
        tokens: of one run; 0 for bare matrix products.
        flops: of one run's matrix products, a multiply-add as two, as torch counts them.
        seconds, processor_seconds: of each round; the latter summed over threads, so that it leaves out
            time in which other processes had the processor.
        missing: why nothing was measured; None where something was.
    """

    name: str
    tokens: int = 0
    flops: int = 0
    seconds: tuple[float, ...] = ()
    processor_seconds: tuple[float, ...] = ()
    missing: str | None = None

    def tokens_per_second(self) -> list[float]:
        return [self.tokens / seconds for seconds in self.seconds]

    def flops_per_second(self) -> list[float]:
        return [self.flops / seconds for seconds in self.seconds]


@dataclass(frozen=True)
class TrainBenchmark:
    """Everything measured.

    Attributes:
        ours, peer: the two models; the peer's ``missing`` says why where it was not measured.
        own_products: the products of our model with its weights, with nothing between them.
        square: a large product of :data:`SQUARE`, repeated; its rate is what shares refer to.
        useful_flops: of one step, by ``pretrain plan``'s count: nothing masked, nothing computed again.
    """

    workload: Workload
    ours: Measurement
    peer: Measurement
    own_products: Measurement
    square: Measurement
    useful_flops: float

    @property
    def rows(self) -> tuple[Measurement, ...]:
        return (self.ours, self.peer, self.own_products, self.square)

    def ratios(self) -> list[float]:
        """Tokens/s of ours over the peer's in each round; empty without a peer."""
        return [peer / ours for ours, peer in zip(self.ours.seconds, self.peer.seconds, strict=False)]

    def processor_ratios(self) -> list[float]:
        """The same by processor time."""
        pairs = zip(self.ours.processor_seconds, self.peer.processor_seconds, strict=False)
        return [peer / ours for ours, peer in pairs]

    def shares(self, row: Measurement, flops: float | None = None) -> list[float]:
        """Share of ``square``'s rate that a row reaches in each round with its own FLOPs, or ``flops``."""
        work = row.flops if flops is None else flops
        rates = self.square.flops_per_second()
        return [work / seconds / rate for seconds, rate in zip(row.seconds, rates, strict=False)]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, every round's."""
        rows = {
            row.name: {
                "missing": row.missing,
                "flops": row.flops,
                "seconds": row.seconds,
                "processor_seconds": row.processor_seconds,
                "tokens_per_second": row.tokens_per_second() if row.tokens else None,
                "share_of_matrix_products": self.shares(row),
            }
            for row in self.rows
        }
        return {
            **machine(),
            "workload": vars(self.workload),
            "rows": rows,
            "ratios": self.ratios(),
            "processor_ratios": self.processor_ratios(),
            "useful_flops": self.useful_flops,
            "useful_shares": {row.name: self.shares(row, self.useful_flops) for row in (self.ours, self.peer)},
        }


def machine() -> dict[str, Any]:
    """Name of the processor, threads that torch uses, versions."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        named = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        name = named[0].split(":", 1)[1].strip() if named else name
    return {"processor": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _baddbmm_flops(_: object, left: torch.Size, right: torch.Size, **__: object) -> int:
    batch, rows, inner = left
    return 2 * batch * rows * inner * right[2]


def count_flops(contestant: Contestant) -> int:
    """FLOPs of the matrix products of one run, as torch counts them."""
    contestant.prepare()
    # Torch's counter leaves out the in-place form.
    mapping = {torch.ops.aten.baddbmm_: _baddbmm_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        contestant.run()
    return counter.get_total_flops()


def time_once(contestant: Contestant) -> tuple[float, float]:
    """Wall and processor time of one run, the latter of all threads; a GPU has finished before and after."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    contestant.prepare()
    synchronise()
    wall, processor = time.perf_counter(), time.process_time()
    contestant.run()
    synchronise()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(contestants: Sequence[Contestant], rounds: int, say: Callable[[str], None]) -> list[Measurement]:
    """Times each contestant once a round, after a round for warming up in which FLOPs are counted."""
    say("counting FLOPs and warming up")
    flops = [count_flops(contestant) for contestant in contestants]
    for contestant in contestants:
        time_once(contestant)
    times: list[list[tuple[float, float]]] = [[] for _ in contestants]
    for index in range(rounds):
        for contestant, taken in zip(contestants, times, strict=True):
            taken.append(time_once(contestant))
        say(f"round {index + 1} of {rounds}: ours {times[0][-1][0]:.3f} s")
    return [
        Measurement(contestant.name, contestant.tokens, counted, *zip(*taken, strict=True))
        for contestant, counted, taken in zip(contestants, flops, times, strict=True)
    ]


def bench_train(workload: Workload, rounds: int, say: Callable[[str], None] = lambda text: None) -> TrainBenchmark:
    """Measures ours, the peer where it is installed, and matrix products.

    Args:
        workload: sizes.
        rounds: how often each is timed, in turns.
        say: takes lines of progress.
    """
    model = our_model(workload)
    contestants = [our_step(workload, model)]
    missing = None
    try:
        contestants.append(peer_step(workload, peer_model(workload, model)))
    except PeerMissing as error:
        missing = Measurement("xlstm package", missing=str(error))
    contestants.append(matrix_products("our products alone", product_shapes(workload, model)))
    rows, inner, columns = SQUARE
    contestants.append(matrix_products(f"{rows} x {inner} by {inner} x {columns}", [SQUARE] * SQUARE_REPEATS))
    ours, *peer, own_products, square = measure(contestants, rounds, say)
    useful = model_flops_per_token(workload.config()) * workload.tokens
    return TrainBenchmark(workload, ours, peer[0] if peer else missing, own_products, square, useful)


def _spread(values: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} .. {high})"


def _percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.median(values):.0f} %"


def table(result: TrainBenchmark) -> Table:
    """The result, medians with the least and the most over the rounds."""
    sizes = result.workload
    drawn = Table(
        title=f"Forward and backward, float32, batch {sizes.batch_size} x {sizes.sequence_length} tokens, "
        f"{sizes.num_layers} layers of {sizes.hidden_size}, {sizes.num_heads} heads",
        caption="median (least .. most) over rounds; shares are of the rate of the last row, round by round",
    )
    for heading in ("", "tokens/s", "GFLOP", "GFLOP/s", "share", "share, useful work"):
        drawn.add_column(heading, justify="right" if heading else "left")
    for row in result.rows:
        if row.missing:
            drawn.add_row(row.name, escape(row.missing))
            continue
        drawn.add_row(
            row.name,
            _spread(row.tokens_per_second(), 0) if row.tokens else "",
            f"{row.flops / 1e9:.1f}",
            _spread([rate / 1e9 for rate in row.flops_per_second()], 0),
            _percent(result.shares(row)),
            _percent(result.shares(row, result.useful_flops)) if row.tokens else "",
        )
    return drawn


def print_bench_train(rounds: int, as_json: bool = False) -> None:
    """Measures at the standard size and prints the table, or JSON with every round."""
    console = Console()
    result = bench_train(Workload(), rounds, (lambda text: None) if as_json else console.print)
    if as_json:
        console.print_json(data=result.to_dict())
        return
    about = machine()
    console.print(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}")
    console.print(table(result))
    if result.peer.missing is None:
        console.print(
            f"ours / xlstm package, tokens/s: {_spread(result.ratios(), 2)}; "
            f"by processor time: {_spread(result.processor_ratios(), 2)}"
        )
    console.print(
        "Both hold the same weights. Ours runs the training path: Megatron-core's schedule, documents, "
        "summed cross-entropy, exact gradient. The package runs its chunkwise--native_autograd kernel and "
        "torch's cross-entropy. With other work on the machine, OMP_NUM_THREADS=1 and processor time are "
        "steadier."
    )
