"""Arguments of the commands that read a configuration for its data section."""

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
