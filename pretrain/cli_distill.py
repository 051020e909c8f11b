"""The commands ``pretrain rank-layers`` and ``pretrain replace-layers``.

As in ``pretrain.cli``, heavy imports stay inside the commands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli_arguments import RunOrCheckpoint


def replace_layers(
    source: RunOrCheckpoint,
    output: Annotated[Path, typer.Argument(help="new directory", metavar="OUT")],
    layers: Annotated[str, typer.Option(help="attention layers, counted from 0, with commas between")],
    mixer: Annotated[str, typer.Option("--with", help="mamba2 or mlstm")] = "mamba2",
    base: Annotated[
        Path | None, typer.Option("--config", help="YAML of all but the model; without it that of the source's run")
    ] = None,
) -> None:
    """Make a student: attention layers become recurrent ones that begin with attention's weights, all else is copied.

    OUT is a checkpoint of step 0 and config.yaml, in which the source is the teacher: pretrain train OUT/config.yaml
    --resume OUT.
    """
    from pretrain.distill.replacing import parse_layers
    from pretrain.distill.replacing import replace_layers as replace

    typer.echo(str(replace(source, output, parse_layers(layers), mixer, base=base)))


def rank_layers(
    source: RunOrCheckpoint,
    samples: Annotated[int, typer.Option(min=1, help="held-out samples, at most, spread over the split")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """How much each attention layer matters: loss and divergence on held-out text where it is left out, least first."""
    from pretrain.distill.ranking import rank_layers as rank

    ranking = rank(source, samples)
    typer.echo(json.dumps(ranking.to_dict(), indent=2) if as_json else ranking.to_text())
