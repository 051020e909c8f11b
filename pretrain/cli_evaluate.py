"""The command that evaluates: ``pretrain evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli_arguments import RunOrCheckpoint


def evaluate(
    source: RunOrCheckpoint,
    samples: Annotated[int, typer.Option(min=1, help="held-out samples, at most, spread over the split")] = 512,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="the loss by position in the document, on rows as in training")
    ] = False,
    lengths: Annotated[
        str | None,
        typer.Option(help="the same on rows of these lengths, such as 512,8192: does the state hold beyond training?"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the loss by position")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Held-out loss in nats per token and bits per byte, beside a bigram model on the same bytes; of a mixture also
    that of each source."""
    from pretrain.evaluate.by_position import parse_lengths

    wanted = None if lengths is None else parse_lengths(lengths)
    from pretrain.evaluate.command import evaluate_checkpoint

    if wanted is None and (by_position or plot is not None):
        wanted = []
    evaluation = evaluate_checkpoint(source, samples, wanted, plot)
    typer.echo(json.dumps(evaluation.to_dict(), indent=2) if as_json else evaluation.to_text())
