"""``pretrain report`` and ``pretrain profile``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from pretrain.errors import InputError


def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories", metavar="RUN...")],
    output: Annotated[Path | None, typer.Option(help="picture, and no page unless --html names one")] = None,
    html: Annotated[Path | None, typer.Option(help="page, and no picture unless --output names one")] = None,
    recall: Annotated[
        list[Path] | None,
        typer.Option(help="directory that bench recall wrote, to be shown on the page; may be given again"),
    ] = None,
) -> None:
    """Compare runs: curves as a picture, and one self-contained page with held-out losses, recall and samples.

    Where neither is named both are written, RUN.png and RUN.html beside the first run.
    """
    from pretrain.observe.page import write_page
    from pretrain.observe.report import draw_report

    if recall and output is not None and html is None:
        raise InputError("--recall is shown on the page alone, and --output asks for a picture alone; give --html too")
    if output is None and html is None:
        first = runs[0].resolve()
        output, html = first.with_name(f"{first.name}.png"), first.with_name(f"{first.name}.html")
    if output is not None:
        typer.echo(f"wrote {draw_report(runs, output)}")
    if html is not None:
        typer.echo(f"wrote {write_page(runs, html, recall or ())}")


def profile(
    config: Annotated[Path, typer.Argument(help="YAML file of the run", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="dotted overrides, for instance train.micro_batch_size=8", metavar="[KEY=VALUE]..."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="steps that are timed, and as many more that are profiled")] = 3,
    warm_up: Annotated[int, typer.Option(min=0, help="steps before them")] = 2,
    output: Annotated[
        Path | None,
        typer.Option("--out", help="directory of the traces; by default RUN-profile beside the run directory"),
    ] = None,
    operations: Annotated[int, typer.Option(min=1, help="how many are shown")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Trace a few steps with torch's profiler, and show the time of each phase and of the longest operations.

    From fresh weights; the run directory is not touched. Under torchrun each rank writes a trace of its own, to be
    opened by Perfetto or chrome://tracing, and the tables are those of rank 0.
    """
    from pretrain.config import load_config
    from pretrain.config.layout import check_world_size

    loaded = load_config(config, overrides or ())
    problem = check_world_size(loaded, int(os.environ.get("WORLD_SIZE", "1")))
    if problem:
        raise InputError(f"{config}: {problem}")
    from pretrain.observe.profile import profile_run

    directory = Path(loaded.run.directory)
    measured = profile_run(loaded, steps, warm_up, output or directory.with_name(directory.name + "-profile"))
    if measured is None:
        return
    if as_json:
        typer.echo(json.dumps(measured.to_dict(operations), indent=2))
        return
    from rich.console import Console

    from pretrain.observe.profile_report import print_profile

    print_profile(measured, operations, Console())
