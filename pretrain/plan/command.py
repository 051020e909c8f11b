"""``pretrain plan``: one layout, or a search over all of them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pretrain.config import load_config
from pretrain.errors import InputError
from pretrain.plan.estimate import plan
from pretrain.plan.report import print_plan
from pretrain.plan.search import search
from pretrain.plan.search_report import print_search, write_layout


@dataclass(frozen=True)
class PlanOptions:
    """What the command line says beside the configuration.

    Attributes:
        gpus: processes; None: as many as the layout needs.
        gpu: kind of GPU; None: none is compared with.
        utilization: of its peak rate.
        as_json: print JSON.
        searches: try all layouts.
        target: file for the best one; None: none is written.
    """

    gpus: int | None
    gpu: str | None
    utilization: float
    as_json: bool
    searches: bool
    target: Path | None


def run_plan(config: Path, overrides: Sequence[str], options: PlanOptions) -> None:
    """Prints the plan or the search.

    Raises:
        InputError: the configuration, the layout or an option is wrong, or nothing fits that was to be written.
    """
    loaded = load_config(config, overrides)
    if options.searches:
        _search(config, overrides, options)
        return
    if options.target is not None:
        raise InputError(f"--write {options.target} writes what --search finds; give --search too")
    planned = plan(loaded, options.gpus, options.gpu, options.utilization)
    if options.as_json:
        print(json.dumps(planned.to_dict(), indent=2))
    else:
        print_plan(planned, Console())


def _search(config: Path, overrides: Sequence[str], options: PlanOptions) -> None:
    if options.gpus is None or options.gpu is None:
        raise InputError("--search needs --gpus, how many there are, and --gpu, of which kind, for instance h100")
    found = search(load_config(config, overrides), options.gpus, options.gpu, options.utilization)
    if options.as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_search(found, Console())
    if options.target is None:
        return
    if not found.fitting:
        raise InputError(
            f"{options.target} is not written: no layout of {found.world_size} x {found.gpu} fits or is allowed; "
            f"take more GPUs, or ones with more memory"
        )
    write_layout(options.target, found.fitting[0], found, config, overrides)
    if not options.as_json:
        print(f"wrote {options.target}; take it by base: [{config}, {options.target}]")
