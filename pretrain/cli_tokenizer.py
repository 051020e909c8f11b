"""The commands ``pretrain tokenizer train`` and ``compare``.

As in ``pretrain.cli``, heavy imports stay inside the commands.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli_arguments import ConfigFile, Overrides

app = typer.Typer(help="Make tokenizers, and compare them.", no_args_is_help=True)


class TokenizerKind(enum.StrEnum):
    """What can be trained."""

    bpe = "bpe"
    sentencepiece = "sentencepiece"


@app.command()
def train(
    config: ConfigFile,
    output: Annotated[Path, typer.Argument(help="new file: .json of bpe, .model of sentencepiece", metavar="OUT")],
    overrides: Overrides = None,
    *,
    vocab_size: Annotated[int, typer.Option(min=1, help="ids, special ones included")],
    kind: Annotated[
        TokenizerKind, typer.Option("--type", help="byte-level BPE, or sentencepiece's BPE with bytes to fall back on")
    ] = TokenizerKind.bpe,
    megabytes: Annotated[
        float, typer.Option(min=1e-6, help="text to train on; of a larger source a part that is spread over it")
    ] = 200.0,
    read_megabytes: Annotated[
        float | None, typer.Option(min=1e-6, help="text to read of the source, from its beginning; by default all")
    ] = None,
    boundary_token: Annotated[
        str | None,
        typer.Option(help="special token in front of each document; by default <|endoftext|>, of sentencepiece </s>"),
    ] = None,
) -> None:
    """Train a tokenizer on the training split of a source or mixture."""
    from pretrain.tokenizer_commands import train_tokenizer

    text = train_tokenizer(
        config, output, overrides or (), kind.value, vocab_size, megabytes, read_megabytes, boundary_token
    )
    typer.echo(text)


@app.command()
def compare(
    config: ConfigFile,
    others: Annotated[
        list[str] | None,
        typer.Argument(
            help="bytes, hierarchical_bytes, a tokenizer.json or its directory, a .model, or a name on the hub; "
            "=TOKEN behind it names its boundary token",
            metavar="[TOKENIZER]...",
        ),
    ] = None,
    megabytes: Annotated[float, typer.Option(min=1e-6, help="held-out text to compare on")] = 8.0,
    read_megabytes: Annotated[
        float | None, typer.Option(min=1e-6, help="text to read of the source, from its beginning; by default all")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Tokens, bytes per token and speed of the configured tokenizer and others, on held-out text."""
    from pretrain.tokenizer_commands import compare_tokenizers, print_comparison

    figures = compare_tokenizers(config, others or (), megabytes, read_megabytes)
    if as_json:
        typer.echo(json.dumps([figure.to_dict() for figure in figures], indent=2))
    else:
        print_comparison(figures)
