"""``bench kernels``: cells beside their peers in one run, or what the Triton kernels compile to.

As in ``bench train``, each round times everyone once and ratios are taken within a round, because other load on a
machine comes and goes. Each round also times a matrix product and a copy, which bound what any form can reach.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kernels.compile import TARGETS, compile_launch, format_table, registered_launches
from pretrain.bench.cells import Bounds, Entry, Problem, Suite
from pretrain.bench.contestants import Contestant, PeerMissing
from pretrain.bench.train import Measurement, machine, time_once
from pretrain.errors import InputError

Say = Callable[[str], None]


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


@dataclass(frozen=True)
class Result:
    """A problem's times.

    Attributes:
        problem: what was done.
        rows: as its entries, ours first.
        product_rates, copy_rates: FLOP/s and bytes/s that bound it, of each round.
        clock: ``processor`` (time of all threads, which leaves out other processes') or ``wall``.
    """

    problem: Problem
    rows: tuple[Measurement, ...]
    product_rates: tuple[float, ...]
    copy_rates: tuple[float, ...]
    clock: str

    def seconds(self, row: Measurement) -> tuple[float, ...]:
        return row.processor_seconds if self.clock == "processor" else row.seconds

    def ratios(self, row: Measurement) -> list[float]:
        """How many times as long as ours a row took, in each round; empty where either was not measured."""
        pairs = zip(self.seconds(row), self.seconds(self.rows[0]), strict=False)
        return [seconds / ours for seconds, ours in pairs]

    def bounds(self) -> list[tuple[float, float]]:
        """In each round, the least seconds that the problem's products and its bytes can take."""
        pairs = zip(self.product_rates, self.copy_rates, strict=True)
        return [(self.problem.flops / products, self.problem.bytes / copy) for products, copy in pairs]

    def bound_by(self) -> str:
        """Which of the two is longer: ``products`` or ``bytes``."""
        products, copy = (statistics.median(seconds) for seconds in zip(*self.bounds(), strict=True))
        return "products" if products > copy else "bytes"

    def shares(self, row: Measurement) -> list[float]:
        """The longer of the two bounds over a row's time, in each round."""
        return [max(bound) / seconds for bound, seconds in zip(self.bounds(), self.seconds(row), strict=False)]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, every round's."""
        rows = {
            row.name: {
                "missing": row.missing,
                "seconds": row.seconds,
                "processor_seconds": row.processor_seconds,
                "ratios": self.ratios(row),
                "shares_of_bound": self.shares(row),
            }
            for row in self.rows
        }
        return {
            "kernel": self.problem.kernel,
            "description": self.problem.description,
            "tokens": self.problem.tokens,
            "flops": self.problem.flops,
            "bytes": self.problem.bytes,
            "bound_by": self.bound_by(),
            "product_rates": self.product_rates,
            "copy_rates": self.copy_rates,
            "rows": rows,
        }


def _ready(entry: Entry) -> Contestant | str:
    """Built and run once, or why it cannot be: a peer may lack what it needs in any way that it likes."""
    try:
        contestant = entry.build()
        time_once(contestant)
    except PeerMissing as error:
        return str(error)
    except Exception as error:
        if not entry.is_peer:
            raise
        reason = str(error).strip().split("\n")[0]
        return f"does not run here: {type(error).__name__}: {reason}"
    return contestant


def measure(problem: Problem, bounds: Bounds, rounds: int, clock: str) -> Result:
    """Times everyone once a round, after a round for warming up.

    Args:
        problem: what to do.
        bounds: what to time beside it.
        rounds: how often.
        clock: which of :class:`Result`'s.
    """
    found = [_ready(entry) for entry in problem.entries]
    contestants = {index: contestant for index, contestant in enumerate(found) if isinstance(contestant, Contestant)}
    contestants |= {-2: bounds.product, -1: bounds.copy}
    times: dict[int, list[tuple[float, float]]] = {index: [] for index in contestants}
    time_once(bounds.product)
    time_once(bounds.copy)
    for _ in range(rounds):
        for index, contestant in contestants.items():
            times[index].append(time_once(contestant))
    rows = []
    for index, entry in enumerate(problem.entries):
        if index in contestants:
            seconds, processor = zip(*times[index], strict=True)
            rows.append(Measurement(entry.name, seconds=seconds, processor_seconds=processor))
        else:
            rows.append(Measurement(entry.name, missing=str(found[index])))
    taken = 1 if clock == "processor" else 0
    products = tuple(bounds.flops / seconds[taken] for seconds in times[-2])
    copies = tuple(bounds.bytes / seconds[taken] for seconds in times[-1])
    return Result(problem, tuple(rows), products, copies, clock)


def select(suite: Suite, only: Sequence[str]) -> Suite:
    """The kernels asked for; all where none is named.

    Raises:
        InputError: there is no such kernel.
    """
    for name in only:
        if name not in suite:
            raise InputError(f"--only {name!r}: must be one of {', '.join(suite)}")
    return {name: problems for name, problems in suite.items() if not only or name in only}


@contextlib.contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Runs torch with this many threads for as long as it lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _spread(values: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} .. {high})"


def _rate(amount: float, seconds: Sequence[float]) -> str:
    return f"{amount / statistics.median(seconds) / 1e9:,.1f}" if amount else ""


def table(results: Sequence[Result]) -> Table:
    """A kernel's results at several lengths: medians over the rounds, of ratios the least and the most too."""
    first = results[0]
    note = f"; {first.problem.note}" if first.problem.note else ""
    bound = " or ".join(sorted({result.bound_by() for result in results}))
    drawn = Table(
        title=f"{first.problem.kernel}: {first.problem.description}",
        caption=f"bound: {bound}{note}",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("", "ms", "times ours", "GFLOP/s", "GB/s", "of bound"):
        drawn.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for result in results:
        drawn.add_section()
        for row in result.rows:
            if row.missing:
                drawn.add_row(escape(f"{row.name}: {row.missing}"))
                continue
            seconds = result.seconds(row)
            ratios = [] if row is result.rows[0] else result.ratios(row)
            drawn.add_row(
                escape(row.name),
                f"{1e3 * statistics.median(seconds):,.1f}",
                _spread(ratios, 2) if ratios else "",
                _rate(result.problem.flops, seconds),
                _rate(result.problem.bytes, seconds),
                f"{100 * statistics.median(result.shares(row)):.1f} %",
            )
    return drawn


def bench_kernels(suite: Suite, bounds: Bounds, rounds: int, clock: str, say: Say = lambda text: None) -> list[Result]:
    """Measures every problem of a suite, one after the other."""
    results = []
    for problems in suite.values():
        for build in problems:
            problem = build()
            say(f"{problem.kernel}: {problem.description}, {problem.tokens} tokens")
            results.append(measure(problem, bounds, rounds, clock))
    return results


def print_bench_kernels(only: Sequence[str], rounds: int, threads: int, as_json: bool = False) -> None:
    """Times the kernels of this machine's device at the standard sizes; prints tables, or JSON with every round.

    Args:
        only: names of kernels; empty: all.
        rounds: how often everyone is timed.
        threads: of torch on the CPU.
        as_json: whether to print JSON.

    Raises:
        InputError: ``only`` names no kernel.
    """
    console, progress = Console(), Console(stderr=True)
    say = (lambda text: None) if as_json else progress.print
    if torch.cuda.is_available():
        from pretrain.bench import cells_cuda as here

        device, clock = torch.cuda.get_device_name(), "wall"
    else:
        from pretrain.bench import cells_cpu as here

        device, clock = "cpu", "processor"
    with threads_of(threads):
        about = machine() | {"device": device, "clock": clock}
        results = bench_kernels(select(here.suite(), only), here.bounds(), rounds, clock, say)
    if as_json:
        console.print_json(data=about | {"results": [result.to_dict() for result in results]})
        return
    console.print(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}, {device}")
    for _, alike in itertools.groupby(results, lambda result: (result.problem.kernel, result.problem.description)):
        console.print(table(list(alike)))
    products, copy = (
        statistics.median(rate for result in results for rate in rates(result))
        for rates in (lambda result: result.product_rates, lambda result: result.copy_rates)
    )
    console.print(
        f"Medians (least .. most) over rounds of {clock} time; ratios are taken within a round. "
        f"The bound is the longer of two times: the least FLOPs of matrix products that any form needs, at this "
        f"machine's {products / 1e9:,.0f} GFLOP/s of a large product, and every input, output and gradient read or "
        f"written once, at its {copy / 1e9:,.1f} GB/s of a copy."
    )
