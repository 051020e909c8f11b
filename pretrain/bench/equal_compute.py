"""``pretrain bench equal-compute``: bits per byte of several configurations that have done the same work."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain.config import Config, load_config
from pretrain.errors import InputError
from pretrain.evaluate.command import evaluate_checkpoint
from pretrain.observe.metrics import read_metrics
from pretrain.plan import model_flops_per_token, plan
from pretrain.train import train


@dataclass(frozen=True)
class Outcome:
    """What one configuration reached.

    Attributes:
        parameters: of the whole model.
        flops_per_token: useful FLOPs of a token forward and backward, as planned.
        spent_flops: of all steps; of a hierarchy with the chunks that it chose, so not quite what was planned.
        bits_per_byte, bigram_bits_per_byte: held out, of the model and of pairs of bytes.
    """

    name: str
    parameters: int
    flops_per_token: float
    steps: int
    tokens: int
    spent_flops: float
    bits_per_byte: float
    bigram_bits_per_byte: float | None


def steps_for(config: Config, flops: float) -> int:
    """How many steps do that much useful work, to the nearest.

    Raises:
        InputError: it is less than one step.
    """
    tokens = config.train.global_batch_size * config.data.sequence_length
    steps = round(flops / (model_flops_per_token(config) * tokens))
    if steps < 1:
        raise InputError(
            f"--flops {flops:g} is less than a step of {config.run.directory}, which takes "
            f"{model_flops_per_token(config) * tokens:.3g}"
        )
    return steps


def equal_compute(
    configs: Sequence[Path],
    overrides: Sequence[str],
    flops: float,
    directory: Path,
    samples: int,
    say: Callable[[str], object],
) -> list[Outcome]:
    """Trains each configuration until it has done ``flops`` of useful work, and evaluates it.

    A run that stands in ``directory`` is gone on with, so what was cut off costs nothing twice. Warm-up takes the same
    share of the steps as in the configuration's own run.

    Raises:
        InputError: a configuration is wrong, two have one name, or the work is less than one step.
    """
    names = [path.stem for path in configs]
    if len(set(names)) < len(names):
        raise InputError(f"two configurations have the same file name among {', '.join(map(str, configs))}")
    loaded = []
    for name, path in zip(names, configs, strict=True):
        own = [*overrides, f"run.directory={directory / name}"]
        config = load_config(path, own)
        steps = steps_for(config, flops)
        warmup = round(config.schedule.warmup_steps * steps / config.train.steps)
        given = [f"train.steps={steps}", f"schedule.warmup_steps={min(warmup, steps - 1)}"]
        loaded.append(load_config(path, [*own, *given]))
    outcomes = []
    for name, config in zip(names, loaded, strict=True):
        say(f"{name}: {config.train.steps} steps")
        train(config)
        outcomes.append(_outcome(name, config, samples))
    return outcomes


def _outcome(name: str, config: Config, samples: int) -> Outcome:
    records = read_metrics(Path(config.run.directory) / "metrics.jsonl")
    before, spent = 0, 0.0
    for record in records:
        flops_per_token = record["tflops_per_second"] * 1e12 / record["tokens_per_second"]
        spent += flops_per_token * (record["tokens"] - before)
        before = record["tokens"]
    evaluation = evaluate_checkpoint(Path(config.run.directory), samples)
    return Outcome(
        name,
        plan(config).parameters,
        model_flops_per_token(config),
        config.train.steps,
        before,
        spent,
        evaluation.bits_per_byte,
        evaluation.bigram_bits_per_byte,
    )


def table(outcomes: Sequence[Outcome]) -> Table:
    """One row for each, the best first."""
    drawn = Table(title="Held-out bits per byte after the same useful work")
    drawn.add_column("configuration")
    for title in ("parameters", "FLOPs/token", "steps", "tokens", "FLOPs spent", "bits/byte", "bigram"):
        drawn.add_column(title, justify="right")
    for row in sorted(outcomes, key=lambda outcome: outcome.bits_per_byte):
        bigram = "-" if row.bigram_bits_per_byte is None else f"{row.bigram_bits_per_byte:.3f}"
        drawn.add_row(
            row.name,
            f"{row.parameters:,}",
            f"{row.flops_per_token:.3g}",
            f"{row.steps:,}",
            f"{row.tokens:,}",
            f"{row.spent_flops:.3g}",
            f"{row.bits_per_byte:.3f}",
            bigram,
        )
    return drawn


def print_equal_compute(
    configs: Sequence[Path], overrides: Sequence[str], flops: float, directory: Path, samples: int, as_json: bool
) -> None:
    """The comparison as a table or as JSON on standard output."""
    notes = Console(stderr=True)
    outcomes = equal_compute(configs, overrides, flops, directory, samples, notes.print)
    if as_json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    else:
        Console().print(table(outcomes))
