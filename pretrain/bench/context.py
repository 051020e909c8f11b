"""``bench context``: one sequence over several processes, what they send each other and how long a step takes.

Every way of doing a step is first held against one process's outcome, and only then timed. Each round times every
group of processes and every scheme once, one after the other, and ratios are taken within a round, because other load
on a machine comes and goes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pretrain.bench import context_steps as steps
from pretrain.bench.contestants import Workload
from pretrain.bench.context_layers import LAYERS, Sizes
from pretrain.bench.context_processes import Processes, take_turn
from pretrain.bench.context_traffic import TrafficRow, count_traffic
from pretrain.errors import CheckError, InputError
from pretrain.models.registry import sequence_mixers

Say = Callable[[str], object]
MODEL = "model"
# Largest difference from one process, over the largest value: float32, sums of thousands of terms in another order.
TOLERANCE = 1e-4
# A whole model's sequence is shorter than a layer's by this; so is attention's.
_MODEL_FRACTION = 4


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        ranks: numbers of processes; one is always among them.
        tokens: of the one sequence that they share.
        only: names of mixers, or ``model``; empty: everything.
        rounds: how often everyone is timed.
        threads: of torch in each process.
        sizes: of the layers.
        model_layers, model_hidden_size: of the whole models: mLSTM and SwiGLU, as the quickstart's.
    """

    ranks: tuple[int, ...] = (1, 2, 4)
    tokens: int = 8192
    only: tuple[str, ...] = ()
    rounds: int = 5
    threads: int = 1
    sizes: Sizes = Sizes()
    model_layers: tuple[int, ...] = (4, 8)
    model_hidden_size: int = 192

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(sorted({1, *self.ranks}))

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that are asked for."""
        return [name for name in names if not self.only or name in self.only]

    def check(self) -> None:
        """Nothing, if all of it can be.

        Raises:
            InputError: an option cannot be.
        """
        known = [*sequence_mixers(), MODEL]
        for name in self.only:
            if name not in known:
                raise InputError(f"--only {name!r}: must be one of {', '.join(known)}")
        multiple = _MODEL_FRACTION * math.lcm(*self.groups)
        if self.tokens < 1 or self.tokens % multiple:
            nearest = max(1, round(self.tokens / multiple)) * multiple
            raise InputError(
                f"--tokens {self.tokens}: must be a multiple of {multiple}, so that a fourth of it divides over "
                f"{' and '.join(map(str, self.groups))} ranks; {nearest} is the nearest"
            )


@dataclass(frozen=True)
class TimeRow:
    """A way of doing a step.

    Attributes:
        scheme: its name.
        ranks: how many processes do it together.
        messages, bytes: that all ranks together receive from others in a step.
        difference: the largest from one process's outcome, of any tensor, over the largest value there.
        seconds: of each round, from the first rank's start to the last one's end.
        processor_seconds: of each round, of all threads of all ranks.
    """

    scheme: str
    ranks: int
    messages: int
    bytes: int
    difference: float
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Timing:
    """A layer's or a model's times, one process's first.

    Attributes:
        name: of the mixer, or ``model``.
        title: what was timed.
        tokens: of its sequence.
        layers: one behind the other.
        rows: of all schemes and numbers of ranks.
    """

    name: str
    title: str
    tokens: int
    layers: int
    rows: tuple[TimeRow, ...]

    def ratios(self, row: TimeRow) -> list[float]:
        """In each round, how many times as long as one process's time over the number of ranks."""
        return [row.ranks * taken / alone for taken, alone in zip(row.seconds, self.rows[0].seconds, strict=True)]

    def at_best(self, row: TimeRow) -> float:
        """That ratio where messages take no time and every rank has a processor: the chain waits for its ends."""
        return (self.layers + row.ranks - 1) / self.layers if row.scheme == steps.CHAIN else 1.0

    def processor_ratios(self, row: TimeRow) -> list[float]:
        """In each round, processor time of all ranks over that of one process."""
        pairs = zip(row.processor_seconds, self.rows[0].processor_seconds, strict=True)
        return [taken / alone for taken, alone in pairs]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, every round's."""
        rows = [
            vars(row)
            | {
                "ratios_to_ideal": self.ratios(row),
                "ratio_at_best": self.at_best(row),
                "processor_ratios": self.processor_ratios(row),
            }
            for row in self.rows
        ]
        return {"name": self.name, "title": self.title, "tokens": self.tokens, "layers": self.layers, "rows": rows}


@dataclass(frozen=True)
class ContextBenchmark:
    """Everything measured."""

    traffic: tuple[TrafficRow, ...]
    timings: tuple[Timing, ...]

    def check(self) -> None:
        """Nothing, if the formulas hold.

        Raises:
            CheckError: a formula and what was counted differ.
        """
        wrong = [f"{row.mixer} by {row.scheme} over {row.ranks} ranks" for row in self.traffic if not row.agrees]
        if wrong:
            raise CheckError(f"what was sent is not what the formulas say: {'; '.join(wrong)}")


def measure(
    groups: Mapping[int, Processes], name: str, title: str, layers: int, settings: Settings, tokens: int,
    hold: Callable[[Processes], list[list[str]]],
) -> Timing:  # fmt: skip
    """Checks every scheme and times it in turns with the others.

    Args:
        hold: makes the ranks of a group hold their steps, and returns the names of these from each.

    Raises:
        CheckError: a scheme's outcome is not that of one process.
    """
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        reference = str(Path(directory) / "reference.safetensors")
        for size, processes in groups.items():
            for scheme in hold(processes)[0]:
                if size == 1:
                    processes.call(steps.save_reference, path=reference)
                differences = processes.call(steps.compare, name=scheme, path=reference)
                for found in differences:
                    for tensor, difference in found.items():
                        # Also where it is not a number.
                        if not difference <= TOLERANCE:
                            raise CheckError(
                                f"{title}: {scheme} over {size} ranks is wrong: {tensor} differs by {difference:.2g} "
                                f"of the largest value, where {TOLERANCE:g} may come of rounding"
                            )
                sent = [pair for found in processes.call(steps.received, name=scheme) for pair in found.values()]
                worst = max(difference for found in differences for difference in found.values())
                messages, moved = (sum(pair[index] for pair in sent) for index in (0, 1))
                rows.append(TimeRow(scheme, size, messages, moved, worst))
    for _ in range(settings.rounds):
        for row in rows:
            starts, ends, processor = zip(*groups[row.ranks].call(take_turn, name=row.scheme), strict=True)
            row.seconds.append(max(ends) - min(starts))
            row.processor_seconds.append(sum(processor))
    return Timing(name, title, tokens, layers, tuple(rows))


def _time_layers(groups: Mapping[int, Processes], settings: Settings, say: Say) -> list[Timing]:
    timings = []
    for name in settings.chosen(list(LAYERS)):
        kind = LAYERS[name]
        tokens = settings.tokens // kind.fraction
        say(f"{kind.title}, {tokens:,} tokens")

        def hold(processes: Processes, name: str = name, tokens: int = tokens) -> list[list[str]]:
            return processes.call(steps.hold_layer, name=name, sizes=settings.sizes, tokens=tokens)

        timings.append(measure(groups, name, kind.title, 1, settings, tokens, hold))
    return timings


def _time_models(groups: Mapping[int, Processes], settings: Settings, say: Say) -> list[Timing]:
    timings = []
    for layers in settings.model_layers if settings.chosen([MODEL]) else ():
        tokens, width = settings.tokens // _MODEL_FRACTION, settings.model_hidden_size
        workload = Workload(1, tokens, width, layers, settings.sizes.heads)
        title = f"whole model, {layers} layers of {width}, mLSTM and SwiGLU"
        say(f"{title}, {tokens:,} tokens")

        def hold(processes: Processes, workload: Workload = workload) -> list[list[str]]:
            return processes.call(steps.hold_model, workload=workload)

        timings.append(measure(groups, MODEL, title, layers, settings, tokens, hold))
    return timings


def device_for(ranks: int) -> str:
    """``cuda`` where there are as many GPUs, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "cpu"


def bench_context(settings: Settings, say: Say = lambda text: None) -> ContextBenchmark:
    """Starts the processes, counts their messages, checks and times them.

    Args:
        settings: what to measure.
        say: takes lines of progress.

    Raises:
        InputError: an option cannot be.
        CheckError: a scheme's outcome is not that of one process.
    """
    settings.check()
    device = device_for(max(settings.groups))
    say(f"starting {sum(settings.groups)} processes, in groups of {', '.join(map(str, settings.groups))}")
    with ExitStack() as stack:
        groups = {}
        for size in settings.groups:
            groups[size] = stack.enter_context(closing(Processes(size, device, settings.threads)))
        traffic = count_traffic(groups, settings.chosen(list(sequence_mixers())), say)
        timings = [*_time_layers(groups, settings, say), *_time_models(groups, settings, say)]
    return ContextBenchmark(tuple(traffic), tuple(timings))
