"""The commands that evaluate: ``pretrain evaluate`` and ``pretrain bench recall``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli_arguments import RunOrCheckpoint
from pretrain.errors import InputError


def evaluate(
    source: RunOrCheckpoint,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="held-out samples, at most, spread over the split (512); with --suite texts of each kind (16)",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="recall: a passkey, and lines that are written again, by length and depth", metavar="NAME"),
    ] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="the loss by position in the document, on rows as in training")
    ] = False,
    lengths: Annotated[
        str | None,
        typer.Option(help="the same on rows of these lengths, such as 512,8192; with --suite bytes of the prompts"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the loss by position, or of the suite")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Held-out loss in nats per token and bits per byte, beside a bigram model on the same bytes; of a mixture also
    that of each source."""
    from pretrain.evaluate.by_position import parse_lengths

    wanted = None if lengths is None else parse_lengths(lengths)
    if suite not in (None, "recall"):
        raise InputError(f"--suite {suite}: expected recall, the only suite that there is")
    if suite is not None and by_position:
        raise InputError("--by-position is of the held-out loss: leave it out, or --suite")
    if suite is not None:
        from pretrain.evaluate.recall.command import evaluate_recall

        evaluation = evaluate_recall(source, samples or 16, wanted, plot)
    else:
        from pretrain.evaluate.command import evaluate_checkpoint

        if wanted is None and (by_position or plot is not None):
            wanted = []
        evaluation = evaluate_checkpoint(source, samples or 512, wanted, plot)
    typer.echo(json.dumps(evaluation.to_dict(), indent=2) if as_json else evaluation.to_text())


def bench_recall(
    configs: Annotated[
        list[str], typer.Argument(help="YAML files of runs; dotted overrides hold for all", metavar="CONFIG...")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="names with commas between: mqar, passkey, automaton, parity, mod3, mod5, anbncn, dyck, copying"
        ),
    ] = "",
    steps: Annotated[int, typer.Option(min=1, help="of each training")] = 1000,
    length: Annotated[int | None, typer.Option(min=2, help="tokens of a sequence in training; default: 64")] = None,
    samples: Annotated[int, typer.Option(min=1, help="test sequences of each length")] = 256,
    out: Annotated[Path | None, typer.Option(help="directory for recall.json, recall.txt and recall.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Train a small model of each configuration from scratch on recall, counting and state tracking, and test it on the
    training length, twice and four times that."""
    from pretrain.bench.recall import print_bench_recall

    files = [Path(name) for name in configs if "=" not in name]
    if not files:
        raise InputError("no configuration is named; give one or more YAML files of runs")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    overrides = [text for text in configs if "=" in text]
    print_bench_recall(files, overrides, names, steps, length, samples, out, as_json)
