"""Arguments that commands of several modules have; configurations are read for their data section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path, typer.Argument(help="YAML file with a data section; others are not looked at", metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="dotted overrides, for instance data.source.path=texts", metavar="[KEY=VALUE]..."),
]
RunOrCheckpoint = Annotated[
    Path, typer.Argument(help="run directory (its newest checkpoint) or one checkpoint", metavar="RUN_OR_CHECKPOINT")
]
