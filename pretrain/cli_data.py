"""The commands ``pretrain data prepare``, ``inspect`` and ``verify``.

As in ``pretrain.cli``, heavy imports stay inside the commands.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli_arguments import ConfigFile, Overrides

app = typer.Typer(help="Prepare text as token ids, and look at what was prepared.", no_args_is_help=True)


class SplitName(enum.StrEnum):
    """The splits of every source."""

    train = "train"
    held_out = "held_out"


@app.command()
def prepare(
    config: ConfigFile,
    output: Annotated[
        Path, typer.Argument(help="directory; of a mixture each source gets one of its own in it", metavar="OUT")
    ],
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="processes that tokenize; 0: this one; by default one for each core")
    ] = None,
    shard_megabytes: Annotated[
        float, typer.Option(min=1e-6, help="text, in megabytes, after which a shard ends")
    ] = 256.0,
    deduplicate: Annotated[
        bool,
        typer.Option(
            "--deduplicate/--keep-duplicates",
            help="of equal documents keep the first, or all; to find them takes 16 to 32 bytes of memory a document",
        ),
    ] = True,
) -> None:
    """Tokenize a source into shards in Megatron's indexed format. Broken off, it goes on when started again."""
    from pretrain.data_commands import prepare_data

    prepare_data(config, output, overrides or (), workers, shard_megabytes, deduplicate)


@app.command()
def inspect(
    source: Annotated[
        Path, typer.Argument(help="prepared directory, or YAML file with a data section", metavar="PATH|CONFIG")
    ],
    overrides: Overrides = None,
    split: Annotated[SplitName, typer.Option(help="whose documents to show")] = SplitName.train,
    first: Annotated[int, typer.Option(min=0, help="number of the first document to show")] = 0,
    documents: Annotated[int, typer.Option(min=0, help="how many documents to show")] = 3,
    characters: Annotated[int, typer.Option(min=1, help="how much of each document to show")] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what data holds, and show documents as text."""
    from data.preparation.inspecting import Shown
    from pretrain.data_commands import inspect_data, print_inspections

    shown = Shown("held_out" if split is SplitName.held_out else "train", first, documents, characters)
    found = inspect_data(source, overrides or (), shown)
    if as_json:
        typer.echo(json.dumps([inspection.to_dict() for inspection in found], indent=2))
    else:
        print_inspections(found)


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(help="prepared directory, or an indexed dataset without its ending", metavar="PATH")
    ],
) -> None:
    """Read everything and compare it with its checksums, its index and its vocabulary."""
    from pretrain.data_commands import verify_data

    typer.echo(verify_data(path))
